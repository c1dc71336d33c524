"""One side of a comparison as a process: it builds, says so, does a step for every line on standard input, and says
what it took. Both ends of it are here.

In: lines. Out: one JSON object a line on what was standard output; what libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


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
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


class Reports:
    """The line to the process that compares."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **facts: Any) -> None:
        """One line."""
        peaks = {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            peaks["device_peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
        self._out.write(json.dumps({**facts, **peaks}) + "\n")
        self._out.flush()


class SideProcess:
    """A side, seen from the process that compares."""

    def __init__(self, module: str, *arguments: str, **environment: str) -> None:
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("BENCH_VERBOSE") else subprocess.DEVNULL,
            text=True,
        )
        self.about = self._report()

    def step(self) -> dict[str, Any]:
        """One step's report."""
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._report()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _report(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise SystemExit(f"{self._module} ended with status {status}; with BENCH_VERBOSE=1 it says why")
        report: dict[str, Any] = json.loads(line)
        return report


def wait_for_go() -> None:
    """The next line of standard input; the process ends with it."""
    if not sys.stdin.readline():
        os._exit(0)
