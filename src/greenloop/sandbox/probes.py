"""What every judge must prove before it is believed: positive and negative controls, as tasks and programs.

A sandbox whose set-up failed refuses everything, so that all attacks seem blocked; one whose locks failed accepts
everything. Each of these catches one of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from greenloop.types import Outcome, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A program whose verdict is known."""

    task: Task
    program: str
    expected: Outcome
    locks: bool = False
    """Only locked levels can pass it."""
    cpu_s: float | None = None
    """CPU limit of its own."""


def _task(name: str, *tests: str) -> Task:
    return Task(task_id=name, statement="", entry_point="f", tests=tests)


_REFUSED = """
import os, socket
def refused(action):
    try: action()
    except OSError: return True
    return False
def f(x):
    return [
        refused(lambda: open("/proc/self/status").read()),
        refused(lambda: open("/etc/hostname").read()),
        refused(lambda: open("/tmp/greenloop-probe", "w")),
        refused(lambda: socket.socket()),
        refused(os.fork),
        refused(lambda: os.kill(os.getppid(), 0)),
        refused(lambda: os.execv("/bin/true", ["true"])),
    ]
"""

PROBES = (
    Probe(
        task=_task("a right program", "assert f(1) == 2", "assert f([1]) == [1, 1]"),
        program="def f(x):\n    return x * 2 if x != 1 else 2\n",
        expected=Outcome.PASSED,
    ),
    Probe(
        task=_task("a wrong program", "assert f(1) == 2"),
        program="def f(x):\n    return x\n",
        expected=Outcome.FAILED,
    ),
    Probe(
        task=_task("files, network, processes and signals are refused", "assert f(0) == [True] * 7"),
        program=_REFUSED,
        expected=Outcome.PASSED,
        locks=True,
    ),
    Probe(
        task=_task("an endless loop is ended", "assert f(0) is None"),
        program="def f(x):\n    while True: pass\n",
        expected=Outcome.TIMEOUT,
        cpu_s=0.02,
    ),
)
