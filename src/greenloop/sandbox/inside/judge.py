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

from . import locks, wire, zygote
from .proxy import Handle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType
    from typing import Any, NoReturn

MIB = 1 << 20
TICK_S = 0.005
GRACE_S = 2.0
"""The judge's own time on a program, over its wall limit."""
AGAIN_S = 0.25
"""Then its alarm rings until the tests give up."""
MEMORY_MIB = 2048
READ_BYTES = 1 << 16
DETAIL = 200
PRELOADED = (
    "bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools",
    "json", "math", "operator", "os", "random", "re", "statistics", "string", "sys", "typing",
)  # fmt: skip
"""Modules that a test may name without importing them (MBPP 596 uses `sys`)."""


HANDLES = 100_000
NEVER_CALLED_BACK = (
    eval,
    exec,
    compile,
    open,
    __import__,
    getattr,
    setattr,
    delattr,
    globals,
    locals,
    vars,
    breakpoint,
)
"""Functions that would give a program the judge's own interpreter; no test may pass them to it."""


class EndedError(BaseException):
    """The conversation with the program's process is over; `args[0]` says how, `args[1]` tells more."""


class Talk:
    """The conversation with one program's process, within its limits."""

    def __init__(self, line: socket.socket, pid: int, limits: dict[str, Any]) -> None:
        self.line, self.pid = line, pid
        self.started_s = time.monotonic()
        self.cpu_limit_s, self.wall_limit_s = limits["cpu_s"], limits["wall_s"]
        self.over: EndedError | None = None
        self.arrived = bytearray()
        self.patience_s = 0.0
        self.entry: Handle | None = None
        self.entry_calls = 0
        """Calls of the entry point that were answered, with a value or with an exception that a test may expect."""
        self.exited = False
        self.callbacks: list[Any] = []
        self.handles: dict[int, Handle] = {}

    def cpu_s(self) -> float:
        """CPU time of all threads of the process, from the kernel's clock for it."""
        return time.clock_gettime((~self.pid << 3) | 2)

    def send(self, value: Any) -> None:
        """One frame to the process."""
        self._send(wire.dumps(value, self.export))

    def _send(self, data: bytes) -> None:
        self._patiently(self.line.sendall, len(data).to_bytes(4, "big") + data)

    def receive(self) -> tuple[Any, ...]:
        """The process's next frame, a tuple that starts with a word."""
        size = int.from_bytes(self._exactly(4), "big")
        if size > wire.FRAME_BYTES:
            self.end("malformed", "a frame beyond the bound")
        try:
            frame = wire.loads(self._exactly(size), self.resolve)
        except wire.MalformedError as error:
            self.end("malformed", str(error))
        if type(frame) is not tuple or not frame or type(frame[0]) is not str:
            self.end("malformed", "not an answer")
        self.exited |= frame[0] == "raised" and _is_raised(frame[-1]) and frame[-1][0] == "SystemExit"
        return frame

    def ask(self, verb: str, *parts: Any) -> Any:
        """The value of a request; raises what it raised in the process, as a built-in exception.

        Raises:
            EndedError: the process ended, met a limit or broke the form; every later request raises it again.
        """
        if self.over is not None:
            raise self.over
        self.send((verb, list(parts)))
        of_entry = verb == "call" and parts[0] == self.entry
        while True:
            kind, *rest = self.receive()
            if kind == "callback" and len(rest) == 3:
                self._call_back(*rest)
            elif kind == "value" and len(rest) == 1:
                self.entry_calls += of_entry
                return rest[0]
            elif kind == "raised" and len(rest) == 1 and _is_raised(rest[0]):
                self.entry_calls += of_entry and rest[0][0] in ORDINARY
                raise _exception(*rest[0], of_next=(verb, *parts[:1]) == ("builtin", "next"))
            elif kind == "unencodable" and len(rest) == 1:
                raise ValueError(f"the function returned what cannot be passed: {rest[0]}"[:DETAIL])
            else:
                self.end("malformed", "not an answer")

    def end(self, how: str, more: str) -> NoReturn:
        """Close the conversation."""
        self.over = EndedError(how, more)
        raise self.over

    def export(self, value: Any) -> list[Any]:
        """A handle goes back as its number; a function of the test as a number that the process may call."""
        if isinstance(value, Handle):
            return ["h", value._number]
        if callable(value) and value not in NEVER_CALLED_BACK:
            self.callbacks.append(value)
            return ["cb", len(self.callbacks) - 1]
        raise wire.UnencodableError(f"a test passes a value of type {type(value).__name__}, which cannot be passed")

    def resolve(self, parts: list[Any]) -> Handle:
        """The handle of an object in the process."""
        if len(parts) != 4 or parts[0] != "h" or type(parts[1]) is not int or type(parts[2]) is not str:
            raise wire.MalformedError("an unknown reference")
        number = parts[1]
        if number not in self.handles:
            if len(self.handles) >= HANDLES:
                raise wire.MalformedError("too many objects")
            self.handles[number] = Handle(self.ask, number, parts[2][:DETAIL])
        return self.handles[number]

    def _call_back(self, number: Any, args: Any, kwargs: Any) -> None:
        if type(number) is not int or not 0 <= number < len(self.callbacks) or type(args) is not list:
            self.end("malformed", "an unknown function")
        try:
            data = wire.dumps(("value", self.callbacks[number](*args, **kwargs)), self.export)
        except Exception as error:
            data = wire.dumps(("raised", [type(error).__name__, str(error)[:DETAIL]]))
        self._send(data)

    def _exactly(self, count: int) -> bytes:
        while len(self.arrived) < count:
            chunk = self._patiently(self.line.recv, READ_BYTES)
            if not chunk:
                self.end("died", "")
            self.arrived += chunk
        data = bytes(self.arrived[:count])
        del self.arrived[:count]
        return data

    def _patiently(self, action: Any, argument: Any) -> Any:
        """Wait for the line no longer than the limits allow."""
        while True:
            cpu_left_s = self.cpu_limit_s - self.cpu_s()
            wall_left_s = self.started_s + self.wall_limit_s - time.monotonic()
            if cpu_left_s <= 0:
                self.end("cpu", "")
            if wall_left_s <= 0:
                self.end("wall", "")
            left_s = min(max(cpu_left_s, TICK_S), wall_left_s)
            if not 0 <= self.patience_s - left_s <= TICK_S:  # setting it costs a system call
                self.patience_s = left_s
                self.line.settimeout(left_s)
            try:
                return action(argument)
            except TimeoutError:
                # A frame that is sent in part cannot be sent again; the process that does not read it waits for time.
                if action == self.line.sendall:
                    self.end("cpu" if self.cpu_s() >= self.cpu_limit_s else "wall", "it does not listen")
            except OSError:
                self.end("died", "")


def _is_raised(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and all(type(part) is str for part in value)


ORDINARY = frozenset(name for name, kind in wire.EXCEPTIONS.items() if issubclass(kind, Exception))


def _exception(name: str, message: str, *, of_next: bool) -> BaseException:
    """The built-in exception of that name.

    What would end a loop of the test unseen (StopIteration but from `next`), or the judge (SystemExit), is a
    RuntimeError.
    """
    kind = wire.EXCEPTIONS.get(name, Exception)
    ends_loops = kind in (StopIteration, StopAsyncIteration) and not of_next
    if ends_loops or not issubclass(kind, Exception):
        return RuntimeError(f"{name}: {message}"[:DETAIL])
    try:
        return kind(message)
    except TypeError:  # UnicodeDecodeError and its like want more
        return ValueError(f"{name}: {message}"[:DETAIL])


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
            name, message = value if _is_raised(value) else ("Exception", "")
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
