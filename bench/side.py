"""One side as a process: it builds, says so, does a step for every line on standard input, and says what it took.

In: lines. Out: one JSON object a line on what was standard output; what libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


class Stages:
    """Seconds by stage of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, stage: str, action: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `action` returns; its time is booked to the stage."""
        started = time.perf_counter()
        try:
            return action(*args, **kwargs)
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


class Reports:
    """The line to the process that compares."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **facts: Any) -> None:
        """One line."""
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self._out.write(json.dumps({**facts, "peak_mb": peak_mb}) + "\n")
        self._out.flush()


def wait_for_go() -> None:
    """The next line of standard input; the process ends with it."""
    if not sys.stdin.readline():
        os._exit(0)
