"""The interpreter in which one program meets its tests. Runs as a script; standard library only.

In: limits on the command line, then over a pipe the program and, once its top level is done, a nonce and the tests.
Out: lines of ASCII over a second pipe: `ready`, `loaded ok|error|memory DETAIL`, then for each test block
`NONCE INDEX passed|failed|uncalled|error|memory DETAIL`.

Does not guarantee an honest answer: the program lives in this interpreter and can, if it is written to, read the nonce
and forge the lines. The parent believes nothing else (no exit status, no output) and enforces the time limits.
"""

# ruff: noqa: BLE001
from __future__ import annotations

import builtins
import ctypes
import marshal
import os
import random
import resource
import sys
from types import ModuleType

# Without `typing` and `collections.abc` the interpreter starts a third faster.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

# Functions below look their builtins up here: a program that patches `builtins` does not change them.
__builtins__ = BUILTINS = dict(vars(builtins))  # type: ignore[assignment]

PRELOADED = (
    "bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools",
    "json", "math", "operator", "os", "random", "re", "statistics", "string", "sys", "typing",
)  # fmt: skip
"""Modules that a test may name without importing them (MBPP 596 uses `sys`)."""

PR_SET_PDEATHSIG = 1
SIGKILL = 9
LINE_BYTES = 400
RESERVE_BYTES = 4 << 20
"""Set aside while the program runs, so that there is memory left to say that it took all."""
EXTRA_TASKS = 64
"""RLIMIT_NPROC above what the whole machine runs: enough for honest threads beside any others of the same user."""

_read, _write, _exit = os.read, os.write, os._exit
_loads, _seed = marshal.loads, random.seed
_compile, _exec, _import = compile, exec, __import__


class CountedCalls:
    """Stands for the entry point in the tests and counts the calls that came back."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self._completed = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the entry point; a call that raises is not counted."""
        value = self._target(*args, **kwargs)
        self._completed += 1
        return value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._target)


def tie_to_parent(parent_pid: int) -> None:
    """Die when the parent dies, even if it is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        _exit(1)


def running_tasks() -> int:
    """Processes and threads on this machine: an upper bound of those that count for RLIMIT_NPROC."""
    with open("/proc/loadavg", encoding="ascii") as loadavg:
        return int(loadavg.read().split()[3].split("/")[1])


def set_limits(cpu_s: int, memory_bytes: int, file_bytes: int, open_files: int) -> None:
    """Bound this process for good. RLIMIT_NPROC does not bind root."""
    for kind, limit in (
        (resource.RLIMIT_NPROC, running_tasks() + EXTRA_TASKS),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, open_files),
        (resource.RLIMIT_AS, memory_bytes),
    ):
        ceiling = resource.getrlimit(kind)[1]
        bounded = limit if ceiling == resource.RLIM_INFINITY else min(limit, ceiling)
        resource.setrlimit(kind, (bounded, bounded))


def receive(source_fd: int) -> Any:
    """The parent's next message: a length of 8 bytes, then marshalled built-in values."""

    def exactly(count: int) -> bytes:
        chunks = []
        while count:
            chunk = _read(source_fd, count)
            if not chunk:
                _exit(1)
            chunks.append(chunk)
            count -= len(chunk)
        return b"".join(chunks)

    return _loads(exactly(int.from_bytes(exactly(8), "big")))


def reply(reply_fd: int, *words: object) -> None:
    """Send one line of printable ASCII."""
    text = " ".join(" ".join(str(word) for word in words).split())
    rest = text.encode("unicode_escape")[:LINE_BYTES] + b"\n"
    while rest:
        rest = rest[_write(reply_fd, rest) :]


def describe(error: BaseException) -> str:
    """Type and message, at most 200 characters; the message is the program's own and may itself raise."""
    try:
        return f"{type(error).__name__}: {error}"[:200].removesuffix(": ")
    except BaseException:
        return "an exception that cannot be printed"


def kind_of(error: BaseException) -> str:
    """The word of the protocol for an exception in a test block."""
    if isinstance(error, MemoryError):
        return "memory"
    return "failed" if isinstance(error, AssertionError) else "error"


def guarded(action: Callable[[], object]) -> tuple[str, str]:
    """Run `action`: `ok` with no detail, or the kind and the description of what it raised."""
    reserve = []
    try:
        reserve.append(bytes(RESERVE_BYTES))
        action()
    except BaseException as error:
        reserve.clear()
        return kind_of(error), describe(error)
    return "ok", ""


def run_source(source: str, filename: str, namespace: dict[str, Any]) -> None:
    """Execute `source` in `namespace`; raises what it raises."""
    _exec(_compile(source, filename, "exec", dont_inherit=True), namespace)


def load(job: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, str]]:
    """Run the data set's prelude and the program in a module named `candidate`: its names, and how that ended."""
    candidate = ModuleType("candidate")
    sys.modules["candidate"] = candidate
    names = vars(candidate)

    def top_level() -> None:
        run_source(job["prelude"], "<prelude>", names)
        _seed(job["seed"])
        run_source(job["program"], "<program>", names)

    return names, guarded(top_level)


def namespace_for_tests(prelude: str, program_names: dict[str, Any], entry_point: str) -> dict[str, Any]:
    """What the tests see: real builtins, the data set's own helpers, and the program's names that shadow neither.

    The entry point is the exception: it may shadow a builtin (MBPP 126 is called `sum`).
    """
    names: dict[str, Any] = {"__name__": "tests", "__builtins__": dict(BUILTINS)}
    run_source(prelude, "<prelude>", names)
    own = set(names) | set(names["__builtins__"])
    names.update({name: value for name, value in list(program_names.items()) if name not in own})
    names[entry_point] = CountedCalls(program_names[entry_point])
    return names


def preload(blocks: list[str], names: dict[str, Any]) -> None:
    """Import the well-known modules that the tests mention and that nobody has bound."""
    for module in PRELOADED:
        if module not in names and any(module in block for block in blocks):
            names[module] = _import(module)


class Examination:
    """The test blocks of one task, ready to run against the names of one program."""

    def __init__(self, job: dict[str, Any], exam: dict[str, Any], program_names: dict[str, Any]) -> None:
        if job["entry_point"] not in program_names:
            raise NameError(f"the program does not define {job['entry_point']!r}")
        self._names = namespace_for_tests(job["prelude"], program_names, job["entry_point"])
        self._calls: CountedCalls = self._names[job["entry_point"]]
        preload([exam["setup"], *exam["blocks"]], self._names)
        run_source(exam["setup"], "<setup>", self._names)
        # Compiled before any call of the program, so that the text of the tests lies in no frame above it.
        self._blocks = [_compile(block, "<test>", "exec", dont_inherit=True) for block in exam["blocks"]]
        exam["blocks"] = None

    def judge(self, index: int, seed: int) -> tuple[str, str]:
        """Run one block: it passes if it raised nothing and completed a call of the entry point."""
        before = self._calls._completed
        _seed(seed)
        kind, detail = guarded(lambda: _exec(self._blocks[index], self._names))
        if kind != "ok":
            return kind, detail
        return ("passed" if self._calls._completed > before else "uncalled"), ""


def examine(job: dict[str, Any], exam: dict[str, Any], program_names: dict[str, Any], reply_fd: int) -> None:
    """Run every test block by itself and send a line for each; where the set-up fails, no block passes.

    Only the first block that does not pass is explained.
    """
    explained = False
    ready: list[Examination] = []
    kind, detail = guarded(lambda: ready.append(Examination(job, exam, program_names)))
    for index, seed in enumerate(exam["seeds"]):
        if ready:
            kind, detail = ready[0].judge(index, seed)
        elif kind != "memory":
            kind = "error"
        reply(reply_fd, exam["nonce"], index, kind, "" if explained else detail)
        explained = explained or kind != "passed"


def main(arguments: list[str]) -> NoReturn:
    """Judge the one program that the parent sends, then end without clean-up."""
    question_fd, reply_fd, parent_pid, *limits = map(int, arguments)
    tie_to_parent(parent_pid)
    os.environ.clear()
    sys.argv[:] = ["candidate"]
    set_limits(*limits)
    reply(reply_fd, "ready")
    job = receive(question_fd)
    names, (kind, detail) = load(job)
    reply(reply_fd, "loaded", kind if kind in ("ok", "memory") else "error", detail)
    if kind == "ok":
        examine(job, receive(question_fd), names, reply_fd)
    _exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
