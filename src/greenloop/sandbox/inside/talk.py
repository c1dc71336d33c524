"""The judge's side of the conversation with one program's process: requests, answers, clocks.

In: the line to the process and its limits. Out: values rebuilt as exact built-ins, handles of what has no value,
built-in exceptions; or `EndedError`, when the process ended, met a limit or broke the form. Nothing it sends is
executed here.
"""

# ruff: noqa: BLE001
from __future__ import annotations

import time

from . import wire
from .proxy import Handle

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any, NoReturn

TICK_S = 0.005
READ_BYTES = 1 << 16
DETAIL = 200
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
        self.exited |= frame[0] == "raised" and is_raised(frame[-1]) and frame[-1][0] == "SystemExit"
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
            elif kind == "raised" and len(rest) == 1 and is_raised(rest[0]):
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


def is_raised(value: Any) -> bool:
    """Name and message of an exception."""
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
