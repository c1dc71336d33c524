"""One program's process: loads the program, then calls its functions when asked and sends back what they return.

In: frames from the judge over one socket: the program, then requests. Out: a frame for each. There are no tests here,
no expected values and no verdict: whatever the program does to this interpreter, it can only change the values that
it claims to return.
"""

# ruff: noqa: BLE001
from __future__ import annotations

import builtins
import os
import random
import sys
from types import ModuleType

from . import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

# Functions below look their builtins up here, and so does the program; `site`, which adds two, is not loaded.
__builtins__ = dict(vars(builtins), exit=sys.exit, quit=sys.exit)  # type: ignore[assignment]

SOCKET_FD = 3
RESERVE_BYTES = 4 << 20
"""Set aside while the program runs, so that there is memory left to say that it took all."""
TEXT = 200
REHEARSALS = 20
"""More than the interpreter needs to specialise a function (PEP 659)."""

_read, _write, _exit = os.read, os.write, os._exit
_compile, _exec = compile, exec


def read_exactly(count: int) -> bytes:
    """That many bytes from the judge; the process ends where the judge does."""
    chunks = []
    while count:
        chunk = _read(SOCKET_FD, min(count, 1 << 20))
        if not chunk:
            _exit(1)
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)


def send(data: bytes) -> None:
    """One frame: a length of 4 bytes and the data."""
    rest = memoryview(len(data).to_bytes(4, "big") + data)
    while rest:
        rest = rest[_write(SOCKET_FD, rest) :]


def receive(resolve: Any) -> Any:
    """The judge's next frame."""
    return wire.loads(read_exactly(int.from_bytes(read_exactly(4), "big")), resolve)


def describe(error: BaseException) -> str:
    """The message of an exception; it is the program's own and may itself raise."""
    try:
        return str(error)[:TEXT]
    except BaseException:
        return "an exception that cannot be printed"


class ByReference:
    """Travels as a handle even if the target has a value of its own."""

    def __init__(self, target: Any) -> None:
        self.target = target


class Program:
    """The loaded program and the objects that the judge holds handles of."""

    def __init__(self) -> None:
        self.module = ModuleType("candidate")
        self.objects: list[Any] = []
        self.known: dict[int, int] = {}

    def export(self, value: Any) -> list[Any]:
        """A handle: its number, the name of the type, whether it can be called."""
        if type(value) is ByReference:
            value = value.target
        place = self.known.get(id(value))
        if place is None:
            place = self.known[id(value)] = len(self.objects)
            self.objects.append(value)
        return ["h", place, type(value).__name__[:TEXT], callable(value)]

    def resolve(self, parts: list[Any]) -> Any:
        """The object of a handle, or a function of the judge's."""
        if parts[0] == "h":
            return self.objects[parts[1]]
        if parts[0] == "cb":
            return lambda *args, **kwargs: self.call_back(parts[1], args, kwargs)
        raise wire.MalformedError("an unknown reference")

    def call_back(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that the test passed: it runs in the judge."""
        send(wire.dumps(("callback", number, list(args), kwargs), self.export))
        while True:
            kind, value = message = receive(self.resolve)
            if kind == "value":
                return value
            if kind == "raised":
                raise wire.EXCEPTIONS.get(value[0], RuntimeError)(value[1])
            self.answer(message)  # the function itself calls the program

    def load(self, job: dict[str, Any]) -> tuple[str, Any]:
        """Run the data set's prelude and the program; its names and a handle of the entry point, or what it raised."""
        sys.modules["candidate"] = self.module
        names = vars(self.module)

        def top_level() -> Any:
            _exec(_compile(job["prelude"], "<prelude>", "exec", dont_inherit=True), names)
            random.seed(job["seed"])
            _exec(_compile(job["program"], "<program>", "exec", dont_inherit=True), names)
            public = [name for name in list(names) if type(name) is str and not name.startswith("__")]
            entry = job["entry_point"]
            return [public[:2000], ByReference(names[entry]) if entry in names else None]

        return guarded(top_level)

    def answer(self, request: tuple[str, list[Any]]) -> None:
        """Do one request and send what came of it."""
        send(self.answered(request))

    def answered(self, request: tuple[str, list[Any]]) -> bytes:
        """What came of a request."""
        verb, parts = request
        kind, value = guarded(lambda: getattr(self, f"do_{verb}")(*parts))
        try:
            return wire.dumps((kind, value), self.export)
        except (wire.UnencodableError, RecursionError) as error:
            return wire.dumps(("unencodable", describe(error)))
        except MemoryError:
            return wire.dumps(("raised", ["MemoryError", ""]))

    def do_call(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The value of a call, and the arguments that it changed in place by their number."""
        passed: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        mutable = {place: argument for place, argument in passed.items() if type(argument) in _MUTABLE}
        before = {place: _encoded(argument, self.export) for place, argument in mutable.items()}
        value = function(*args, **kwargs)
        changed = {
            place: argument
            for place, argument in mutable.items()
            if before[place] is not None and _encoded(argument, self.export) != before[place]
        }
        same = next((place for place, argument in mutable.items() if argument is value), None)
        return [None if same is not None else value, same, changed]

    def do_name(self, name: str) -> Any:
        """A global of the program."""
        return vars(self.module)[name]

    def do_getattr(self, target: Any, name: str) -> Any:
        """An attribute."""
        return getattr(target, name)

    def do_setattr(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute."""
        setattr(target, name, value)

    def do_getitem(self, target: Any, key: Any) -> Any:
        """`target[key]`."""
        return target[key]

    def do_setitem(self, target: Any, key: Any, value: Any) -> None:
        """`target[key] = value`."""
        target[key] = value

    def do_isinstance(self, value: Any, kind: Any) -> bool:
        """`isinstance(value, kind)` for a class of the program's."""
        return isinstance(value, kind)

    def do_builtin(self, name: str, target: Any) -> Any:
        """len, iter, next, bool, str, repr, int, float or abs of an object."""
        return _APPLICABLE[name](target)


_MUTABLE = frozenset(kind for kind in wire.TYPES.values() if kind.__hash__ is None)
_APPLICABLE = {f.__name__: f for f in (len, iter, next, bool, str, repr, int, float, abs)}


def _encoded(value: Any, export: Any) -> bytes | None:
    try:
        return wire.dumps(value, export)
    except (wire.UnencodableError, RecursionError):
        return None


_reserve = [bytes(RESERVE_BYTES)]
"""Made before the fork: making it anew for each request cost as much as everything else a program does."""


def guarded(action: Any) -> tuple[str, Any]:
    """`value` and what `action` returned, or `raised` and the nearest built-in exception with its message."""
    try:
        if not _reserve:
            _reserve.append(bytes(RESERVE_BYTES))
        return "value", action()
    except BaseException as error:
        _reserve.clear()
        mro = type.mro(type(error))
        known = next((kind.__name__ for kind in mro if wire.EXCEPTIONS.get(kind.__name__) is kind), "Exception")
        # str() of a KeyError quotes its key; the judge makes another KeyError of it, which would quote it again.
        plain_key = known == "KeyError" and len(error.args) == 1 and type(error.args[0]) is str
        detail = error.args[0][:TEXT] if plain_key else describe(error)
        own = type(error).__name__
        return "raised", [known, detail if own == known else f"{own}: {detail}"[:TEXT]]


def rehearse(times: int) -> None:
    """Load and call a small program here, before a real one comes.

    In the fork server: what the interpreter notes in its own memory as it learns this code would otherwise be noted,
    and paid for, in each process that is forked. In a process that waits: its first call copies the memory that every
    call writes to, which takes longer than the call.
    """
    text = "import math\ndef f(x, y):\n    return [x + i for i in range(len(y))]\n"
    job = wire.dumps({"prelude": "", "program": text, "entry_point": "f", "seed": 1})
    for _ in range(times):
        program = Program()
        wire.dumps(program.load(wire.loads(job, program.resolve)), program.export)
        call = wire.dumps(("call", [program.module.f, [1, [2, "a", (3.5, True)]], {}]), program.export)
        program.answered(wire.loads(call, program.resolve))
    del sys.modules["candidate"]


def serve() -> NoReturn:
    """Load the program that the judge sends, then answer requests until the judge has enough."""
    rehearse(1)
    program = Program()
    job = receive(program.resolve)
    send(wire.dumps(program.load(job), program.export))
    while True:
        program.answer(receive(program.resolve))
