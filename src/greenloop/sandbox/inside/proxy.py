"""What stands in the judge for objects that live in a program's process.

Nothing of the program is executed here, and nothing is compared there: two handles are equal only if they mean the same
object, and no handle equals a value.
"""

from __future__ import annotations

from . import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Ask = Callable[..., Any]


class Handle:
    """An object of the program: attributes, calls, items and iteration go to its process."""

    __slots__ = ("_ask", "_name", "_number")

    def __init__(self, ask: Ask, number: int, name: str) -> None:
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_name", name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it in the program's process; mutable arguments are left as the call left them."""
        value, same, changed = _call_result(self._ask("call", self, list(args), kwargs))
        passed: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        for place, new in changed.items():
            _write_back(passed[place], new)
        return value if same is None else passed[same]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__", "__dict__", "__annotations__"):
            raise AttributeError(f"{self._name!r} object has no attribute {name!r}")
        return self._ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("setitem", self, key, value)

    def __contains__(self, item: Any) -> bool:
        # Not asked of the program, which would learn the item and could say yes to all: its items are compared here.
        return any(part is item or part == item for part in self)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, Handle) and bool(self._ask("isinstance", instance, self))

    def __iter__(self) -> Any:
        return self._ask("builtin", "iter", self)

    def __next__(self) -> Any:
        return self._ask("builtin", "next", self)

    def __len__(self) -> int:
        return _whole(self._ask("builtin", "len", self))

    def __bool__(self) -> bool:
        return bool(self._ask("builtin", "bool", self))

    def __int__(self) -> int:
        return _whole(self._ask("builtin", "int", self))

    def __float__(self) -> float:
        value = self._ask("builtin", "float", self)
        if type(value) is not float:
            raise TypeError("__float__ returned no float")
        return value

    def __abs__(self) -> Any:
        return self._ask("builtin", "abs", self)

    def __str__(self) -> str:
        return _text(self._ask("builtin", "str", self))

    def __repr__(self) -> str:
        return _text(self._ask("builtin", "repr", self))

    def __copy__(self) -> Handle:
        return self

    def __deepcopy__(self, _: Any) -> Handle:
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and self._number == other._number

    def __hash__(self) -> int:
        return hash(self._number)


def _call_result(answer: Any) -> tuple[Any, int | None, dict[int, Any]]:
    """Refuses what `Program.do_call` would not have said."""
    if type(answer) is not list or len(answer) != 3 or type(answer[2]) is not dict:
        raise wire.MalformedError("not the result of a call")
    return answer[0], answer[1], answer[2]


def _write_back(argument: Any, new: Any) -> None:
    """Give a mutable argument the content that the call left it with."""
    kind = type(argument)
    if type(new) is not kind:
        raise wire.MalformedError("an argument changed its type")
    if isinstance(argument, dict):
        argument.clear()
        argument.update(new)
    elif isinstance(argument, set):
        argument.clear()
        argument |= new
    elif isinstance(argument, list | bytearray):
        argument[:] = new
    else:
        argument.clear()
        argument.extend(new)


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("an integer was expected")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError("text was expected")
    return value
