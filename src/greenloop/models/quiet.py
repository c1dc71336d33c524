"""Transformers without its progress bars, for as long as a block runs: a live display of ours may own the terminal.

The bar over a GGUF file's tensors, seen once a file, is not transformers' own and stays.
"""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Switch the bars of transformers off and afterwards back to what they were."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
