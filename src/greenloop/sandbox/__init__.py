"""Judging programs away from the trainer: `SandboxVerifier` and its `Limits`.

In: a task and a program. Out: a `Verdict`. Knows no model and no reward; imports neither torch nor transformers.
"""

from greenloop.sandbox.limits import Limits
from greenloop.sandbox.pool import SandboxVerifier

__all__ = ["Limits", "SandboxVerifier"]
