"""The judge: evaluates tests itself and only asks the program's process to call functions.

In: jobs from the trainer on standard input, one JSON object a frame. Out: what was seen, one frame a job. It holds the
tests; the program's process never does. It believes no exit status and no output, only values that it compares itself,
rebuilt as exact built-ins. It is confined too (tests come from anywhere): no capability, no network, no file but the
library's, no new process after its fork server.
"""

# ruff: noqa: BLE001
from __future__ import annotations

import builtins
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

from . import locks, zygote
from .proxy import Handle
from .talk import DETAIL, EndedError, Talk, is_raised

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType
    from typing import Any, NoReturn

MIB = 1 << 20
GRACE_S = 2.0
"""The judge's own time on a program, over its wall limit."""
AGAIN_S = 0.25
"""Then its alarm rings until the tests give up."""
MEMORY_MIB = 2048
PRELOADED = (
    "bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools",
    "json", "math", "operator", "os", "random", "re", "statistics", "string", "sys", "typing",
)  # fmt: skip
"""Modules that a test may name without importing them (MBPP 596 uses `sys`)."""


class Examination:
    """The test blocks of one task against one program."""

    def __init__(self, talk: Talk, job: dict[str, Any], loaded: Any) -> None:
        entry, program_names = job["entry_point"], loaded[0]
        if not isinstance(loaded[1], Handle):
            raise NameError(f"the program does not define {entry!r}")
        # Compiled before the program is asked anything.
        setup = _compiled(job["setup"], "<setup>")
        self.blocks = [_compiled(block, "<test>") for block in job["blocks"]]
        self.names: dict[str, Any] = {"__name__": "tests", "__builtins__": dict(vars(builtins))}
        exec(_compiled(job["prelude"], "<prelude>"), self.names)
        wanted = set().union(*(_mentioned(code) for code in (setup, *self.blocks)))
        # The well-known modules are the test's own, whatever the program calls by their names.
        own = set(self.names) | set(self.names["__builtins__"]) | set(PRELOADED)
        for name in program_names:
            if name in wanted and name not in own:
                self.names[name] = talk.ask("name", name)
        self.talk, talk.entry = talk, loaded[1]
        self.names[entry] = talk.entry
        for module in PRELOADED:
            if module in wanted and module not in self.names:
                self.names[module] = __import__(module)
        exec(setup, self.names)

    def judge(self, index: int, seed: int) -> tuple[str, str]:
        """Run one block: it passes if it raised nothing and the program answered a call of the entry point."""
        before = self.talk.entry_calls
        random.seed(seed)
        exec(self.blocks[index], self.names)
        return ("passed", "") if self.talk.entry_calls > before else ("uncalled", "")


@functools.lru_cache(maxsize=4096)
def _compiled(source: str, name: str) -> CodeType:
    """Code of the data set's own text, which comes again with each completion of the task."""
    return compile(source, name, "exec", dont_inherit=True)


def _mentioned(code: CodeType) -> set[str]:
    """Every name in the code and the code inside it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, type(code)):
            names |= _mentioned(constant)
    return names


def _kind_of(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "memory"
    return "failed" if isinstance(error, AssertionError) else "error"


def _describe(error: BaseException) -> str:
    return _one_line(f"{type(error).__name__}: {error}".removesuffix(": "))


def _one_line(text: str) -> str:
    """Printable ASCII, at most `DETAIL` characters."""
    return " ".join(text.split()).encode("unicode_escape").decode()[:DETAIL]


def examine(talk: Talk, job: dict[str, Any]) -> dict[str, Any]:
    """Load the program and run every block; what was seen, as far as it came."""
    seen: dict[str, Any] = {"ending": "answered", "note": "", "load": None, "load_detail": "", "blocks": []}
    try:
        talk.send({key: job[key] for key in ("prelude", "program", "entry_point", "seed")})
        kind, value = talk.receive()
        if kind != "value":
            name, message = value if is_raised(value) else ("Exception", "")
            seen["load"] = "memory" if name == "MemoryError" else "error"
            seen["load_detail"] = _one_line(f"{name}: {message}".removesuffix(": "))
            return seen
        seen["load"] = "ok"
        _run_blocks(talk, job, value if _is_loaded(value) else [[], None], seen["blocks"])
    except EndedError as ended:
        seen["ending"], seen["note"] = ended.args[0], _one_line(ended.args[1])
    except Exception as error:  # nothing that a program sends may end the judge
        seen["ending"], seen["note"] = "malformed", _describe(error)
    return seen


def _is_loaded(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and type(value[0]) is list


def _run_blocks(talk: Talk, job: dict[str, Any], loaded: list[Any], results: list[tuple[str, str]]) -> None:
    """One result a block; where the set-up fails, no block passes. Only the first that does not pass is explained."""
    exam: Examination | None = None
    failure = ("error", "")
    try:
        exam = Examination(talk, job, loaded)
    except Exception as error:
        failure = ("memory" if isinstance(error, MemoryError) else "error", _describe(error))
    for index, seed in enumerate(job["seeds"]):
        try:
            result = exam.judge(index, seed) if exam else failure
        except (EndedError, JudgeTimeoutError):
            raise
        except BaseException as error:
            result = (_kind_of(error), _describe(error))
        # A test may have swallowed either.
        if talk.over is not None:
            raise talk.over
        if time.monotonic() > talk.started_s + talk.wall_limit_s + GRACE_S:
            raise JudgeTimeoutError
        explained = any(kind != "passed" for kind, _ in results)
        results.append((result[0], "" if explained else result[1]))


class Worker:
    """The judge's own loop: a fork server, and one program after another."""

    def __init__(self, level: str) -> None:
        ours, theirs = socket.socketpair()
        command = bootstrap(f"zygote.main({theirs.fileno()}, {level!r})")
        self.server = subprocess.Popen(
            command, env={"PYTHONHASHSEED": "0"}, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, close_fds=True, pass_fds=(theirs.fileno(),),
        )  # fmt: skip
        theirs.close()
        self.control, self.level = ours, level
        self.reaping = False
        answer = self.control.recv(1000)
        if answer != zygote.READY:
            raise OSError(answer.decode(errors="replace") or "the fork server did not start")

    def judge(self, job: dict[str, Any]) -> dict[str, Any]:
        """What was seen of one program."""
        limits = job["limits"]
        pid, line = self._process(limits)
        with line:
            talk = Talk(line, pid, limits)
            signal.setitimer(signal.ITIMER_REAL, limits["wall_s"] + GRACE_S, AGAIN_S)
            try:
                seen = examine(talk, job)
            except JudgeTimeoutError:
                seen = {"ending": "wall", "note": "the tests themselves", "load": "ok", "load_detail": "", "blocks": []}
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            wall_s = time.monotonic() - talk.started_s
        cpu_s, exited = talk.cpu_s(), talk.exited
        self.control.sendall(b"K")
        self.reaping = True
        if seen["ending"] == "answered" and cpu_s >= limits["cpu_s"]:
            seen["ending"] = "cpu"  # it answered between two looks at its clock
        if seen["ending"] == "died":
            status, cpu_s = self._reaped()
            ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            seen["note"] = _signal_name(ended) if ended else f"exit status {os.WEXITSTATUS(status)}"
            exited |= not ended
            if cpu_s >= limits["cpu_s"] or ended == signal.SIGXCPU:
                seen["ending"] = "cpu"
        return {**seen, "cpu_s": cpu_s, "wall_s": wall_s, "exited": exited}

    def _process(self, limits: dict[str, Any]) -> tuple[int, socket.socket]:
        """A locked process that waits for its program, and the line to it."""
        if self.reaping:
            self._reaped()
        bounds = (int(limits["cpu_s"]) + 2, limits["memory_mib"] * MIB, limits["file_bytes"], limits["open_files"])
        self.control.sendall(b"F" + zygote.BOUNDS.pack(*bounds))
        data, descriptors, _, _ = socket.recv_fds(self.control, zygote.PID.size, 1)
        if len(data) != zygote.PID.size or len(descriptors) != 1:
            raise OSError("the fork server ended")
        return zygote.PID.unpack(data)[0], socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptors[0])

    def _reaped(self) -> tuple[int, float]:
        """Wait status and CPU seconds of the last process; the fork server reaps while the judge goes on."""
        self.reaping = False
        data = self.control.recv(zygote.ENDED.size, socket.MSG_WAITALL)
        if len(data) != zygote.ENDED.size:
            raise OSError("the fork server ended")
        status, user_s, system_s = zygote.ENDED.unpack(data)
        return status, user_s + system_s


class JudgeTimeoutError(BaseException):
    """The judge's own time on a program is over."""


def _out_of_time(*_: object) -> NoReturn:
    raise JudgeTimeoutError


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def bootstrap(call: str) -> list[str]:
    """The command line of an interpreter that runs `call` on these modules: isolated, reproducible, no site."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    code = f"import sys; sys.path.insert(0, {folder!r}); from inside import judge, zygote; del sys.path[0]; {call}"
    return [sys.executable, "-s", "-S", "-P", "-B", "-c", code]


def level_of(mode: str) -> str:
    """The strongest level that this kernel offers; raises OSError where there is none."""
    if mode == "rlimits-only":
        return mode
    if locks.MACHINE not in locks.SUPPORTED:
        raise OSError(f"no system call table for {locks.MACHINE} (there are {', '.join(locks.SUPPORTED)})")
    return "full" if mode == "auto" and locks.landlock_abi() else "no-open"


def confine(level: str) -> None:
    """Lock the judge itself; its fork server runs already."""
    locks.limit_resources(cpu_s=1 << 30, memory_bytes=MEMORY_MIB * MIB, file_bytes=0, open_files=64)
    if level == "rlimits-only":
        return
    locks.drop_privileges()
    if level == "full":
        locks.restrict_files(*locks.library_paths())
    locks.CallFilter(locks.seccomp_filter(locks.MACHINE, may_open=level == "full", may_judge=True)).install()


def main(mode: str, cpu: int | None) -> NoReturn:
    """Judge what comes on standard input until it is closed.

    Args:
        mode: `auto`, `no-open` or `rlimits-only`.
        cpu: where this process, its fork server and the programs run; None leaves that to the kernel.
    """
    if not __debug__:
        raise SystemExit("asserts are switched off in this interpreter: it cannot judge")
    locks.die_with_parent(os.getppid())
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    try:
        level = level_of(mode)
        worker = Worker(level)
        os.environ.clear()
        zygote.preload()
        signal.signal(signal.SIGALRM, _out_of_time)
        confine(level)
    except OSError as error:
        _reply(answers, {"error": f"the kernel refuses a lock ({error})"})
        os._exit(1)
    _reply(answers, {"level": level})
    while True:
        header = questions.read(4)
        if len(header) < 4:
            os._exit(0)
        job = json.loads(questions.read(int.from_bytes(header, "big")))
        _reply(answers, worker.judge(job))


def _reply(answers: Any, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    answers.write(len(data).to_bytes(4, "big") + data)
    answers.flush()
