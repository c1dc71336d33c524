"""greenloop teaches a small language model to write Python that passes tests."""

__version__ = "0.1.0"
