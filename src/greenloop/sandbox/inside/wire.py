"""Values between a program's process and the judge: a bounded, tagged encoding in JSON.

In: Python values. Out: bytes, and back to values of exact built-in (or standard library) types; whatever class the
sender used, no code of it comes along. Never pickle, marshal, eval or a repr. Every number is bounded before it is
built, because the sender may be hostile: depth, nodes, digits, exponents, bytes.

A value is `null`, a boolean, a string, a float or an integer of 64 bits as itself, anything else `[tag, ...]`.
"""

# ruff: noqa: BLE001
from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import fractions
import functools
import json
import keyword
import math

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

# Functions below look their builtins up here: a program that patches `builtins` does not change them.
__builtins__ = dict(vars(builtins))  # type: ignore[assignment]
# So do these parts of `json`, which are C; its Python parts would not.
_scan_once = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
_chunks = json.encoder.c_make_encoder(  # type: ignore[attr-defined]
    None, None, json.encoder.encode_basestring_ascii, None, ":", ",", False, False, True
)

FRAME_BYTES = 8 << 20
DEPTH = 60
NODES = 1_000_000
HEX_DIGITS = 1 << 18
"""Of an integer: a million bits."""
EXPONENT = 20_000
"""Of a decimal, in powers of ten either way."""
FIELDS = 64
"""Of a named tuple."""
WORD = 1 << 63
RANGE = 10_000_000
"""Length of a range: a test that sums it must end."""
COLLISIONS = 200
"""Keys of one hash."""

TYPES = {
    t.__name__: t
    for t in (
        bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, range, object, type,
        type(None), type(len), type(lambda: 0), collections.Counter, collections.OrderedDict, collections.defaultdict,
        collections.deque, decimal.Decimal, fractions.Fraction, datetime.date, datetime.time, datetime.datetime,
        datetime.timedelta,
    )
}  # fmt: skip
"""Types that may travel by name; exceptions are added below."""
EXCEPTIONS = {
    name: value
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, BaseException)
}
TYPES.update(EXCEPTIONS)
_NAMES = {value: name for name, value in TYPES.items()}
_SINGLES = {"Ellipsis": Ellipsis, "NotImplemented": NotImplemented}


class UnencodableError(ValueError):
    """The value has no encoding, or one beyond the bounds."""


class MalformedError(ValueError):
    """The bytes are not such an encoding, or go beyond the bounds."""


def _no_export(value: object) -> list[Any]:
    raise UnencodableError(f"a value of type {type(value).__name__} cannot be passed")


def _no_resolve(parts: list[Any]) -> object:
    raise MalformedError("a reference where none may be")


def dumps(value: object, export: Callable[[Any], list[Any]] = _no_export) -> bytes:
    """The encoding of `value`.

    Args:
        value: anything.
        export: makes `[tag, ...]` of what has no value of its own (functions, objects of the program's classes).

    Raises:
        UnencodableError: too deep, too large, or refused by `export`.
    """
    text = "".join(_chunks(_Encoder(export).pack(value, 0), 0))
    if len(text) > FRAME_BYTES:
        raise UnencodableError(f"a value of {len(text)} bytes, more than {FRAME_BYTES}")
    return text.encode("ascii")


def loads(data: bytes, resolve: Callable[[list[Any]], Any] = _no_resolve) -> Any:
    """The value that `dumps` encoded.

    Args:
        data: at most `FRAME_BYTES`.
        resolve: makes a value of the references that `export` made; raises MalformedError for others.

    Raises:
        MalformedError: not an encoding, or beyond the bounds.
    """
    if len(data) > FRAME_BYTES:
        raise MalformedError("a frame beyond the bound")
    try:
        text = data.decode("utf-8")
        packed, end = _scan_once(text, 0)
    except (ValueError, RecursionError, StopIteration):
        raise MalformedError("not JSON") from None
    if end != len(text):
        raise MalformedError("more than one value")
    try:
        return _Decoder(resolve).unpack(packed, 0)
    except (MalformedError, MemoryError):
        raise
    except Exception as error:  # whatever else hostile parts make a constructor raise
        raise MalformedError(f"{type(error).__name__} in a value") from None


class _Encoder:
    def __init__(self, export: Callable[[Any], list[Any]]) -> None:
        self._export = export
        self._nodes = 0

    def pack(self, value: Any, depth: int) -> Any:
        self._nodes += 1
        if self._nodes > NODES:
            raise UnencodableError(f"a value of more than {NODES} parts")
        kind = type(value)
        if value is None or kind is bool or kind is float:
            return value
        if kind is str:
            return value if value.isascii() else _text_or_tag(value)
        if kind is int:
            return value if -WORD <= value < WORD else _long(value)
        if depth > DEPTH:
            raise UnencodableError(f"a value nested deeper than {DEPTH}")
        packer = _PACKERS.get(kind)
        if packer is not None:
            return packer(self, value, depth + 1)
        return self._of_other_kind(value, depth)

    def _of_other_kind(self, value: Any, depth: int) -> Any:
        """A type by name, a subclass of a built-in as its base, or a reference."""
        if isinstance(value, type):
            return ["T", _NAMES[value]] if value in _NAMES else self._export(value)
        fields = getattr(type(value), "_fields", None)
        if isinstance(value, tuple) and isinstance(fields, tuple):
            return ["nt", type(value).__name__, list(fields), self.items(tuple.__iter__(value), depth + 1)]
        for base, plain in _PLAIN:
            if isinstance(value, base):
                return self.pack(plain(value), depth)
        for name, single in _SINGLES.items():
            if value is single:
                return ["e", name]
        return self._export(value)

    def items(self, values: Iterable[Any], depth: int) -> list[Any]:
        return [self.pack(value, depth) for value in values]

    def pairs(self, value: Any, depth: int) -> list[Any]:
        flat = []
        for key, item in dict.items(value):
            flat.append(self.pack(key, depth))
            flat.append(self.pack(item, depth))
        return flat


def _text_or_tag(value: str) -> Any:
    """Lone surrogates have a tag: JSON would join two of them into one character."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return ["u", value.encode("utf-8", "surrogatepass").decode("latin-1")]
    return value


def _long(value: int) -> list[Any]:
    if value.bit_length() > 4 * HEX_DIGITS:
        raise UnencodableError("an integer of more than a million bits")
    return ["i", hex(value)]


def _zone(value: Any) -> Any:
    """Seconds and microseconds of the offset; a zone travels as its offset alone."""
    offset = value.utcoffset()
    return None if offset is None else [offset.days, offset.seconds, offset.microseconds]


def _moment(value: Any, *names: str) -> list[int]:
    return [int(getattr(value, name)) for name in names]


_CLOCK = ("hour", "minute", "second", "microsecond")
_PACKERS: dict[type, Callable[[_Encoder, Any, int], list[Any]]] = {
    list: lambda e, v, d: ["l", e.items(v, d)],
    tuple: lambda e, v, d: ["t", e.items(v, d)],
    set: lambda e, v, d: ["s", e.items(v, d)],
    frozenset: lambda e, v, d: ["f", e.items(v, d)],
    dict: lambda e, v, d: ["d", e.pairs(v, d)],
    collections.OrderedDict: lambda e, v, d: ["od", e.pairs(v, d)],
    collections.Counter: lambda e, v, d: ["C", e.pairs(v, d)],
    collections.defaultdict: lambda e, v, d: ["dd", _NAMES.get(v.default_factory), e.pairs(v, d)],
    collections.deque: lambda e, v, d: ["dq", v.maxlen, e.items(v, d)],
    bytes: lambda e, v, d: ["b", v.decode("latin-1")],
    bytearray: lambda e, v, d: ["ba", v.decode("latin-1")],
    complex: lambda e, v, d: ["c", v.real, v.imag],
    range: lambda e, v, d: ["r", *(e.pack(part, d) for part in (v.start, v.stop, v.step))],
    decimal.Decimal: lambda e, v, d: ["D", str(v)],
    fractions.Fraction: lambda e, v, d: ["F", e.pack(v.numerator, d), e.pack(v.denominator, d)],
    datetime.date: lambda e, v, d: ["date", *_moment(v, "year", "month", "day")],
    datetime.time: lambda e, v, d: ["time", *_moment(v, *_CLOCK, "fold"), _zone(v)],
    datetime.datetime: lambda e, v, d: ["datetime", *_moment(v, "year", "month", "day", *_CLOCK, "fold"), _zone(v)],
    datetime.timedelta: lambda e, v, d: ["delta", *_moment(v, "days", "seconds", "microseconds")],
}
for _view, _tag in (({}.keys(), "dk"), ({}.values(), "dv"), ({}.items(), "di")):
    _PACKERS[type(_view)] = lambda e, v, d, tag=_tag: [tag, e.items(v, d)]  # type: ignore[misc]
_PLAIN: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (int, lambda v: int.__add__(v, 0)),
    (float, float.__pos__),
    (str, str.__str__),
    (bytes, lambda v: bytes(bytes.__iter__(v))),
    (bytearray, lambda v: bytearray(bytearray.__iter__(v))),
    (list, lambda v: list(list.__iter__(v))),
    (tuple, lambda v: tuple(tuple.__iter__(v))),
    (dict, lambda v: dict(dict.items(v))),
    (set, lambda v: set(set.__iter__(v))),
    (frozenset, lambda v: frozenset(frozenset.__iter__(v))),
)


class _Decoder:
    def __init__(self, resolve: Callable[[list[Any]], Any]) -> None:
        self._resolve = resolve
        self._nodes = 0

    def unpack(self, packed: Any, depth: int) -> Any:
        self._nodes += 1
        if self._nodes > NODES:
            raise MalformedError("too many parts")
        kind = type(packed)
        if packed is None or kind is bool or kind is str:
            return packed
        if kind is float:
            # One object for all of them, as in a program: a list with it equals a list with it.
            return packed if packed == packed else math.nan
        if kind is int:
            if not -WORD <= packed < WORD:
                raise MalformedError("a long integer without its tag")
            return packed
        if kind is not list or not packed or type(packed[0]) is not str:
            raise MalformedError("no tag")
        if depth > DEPTH:
            raise MalformedError("too deep")
        unpacker = _UNPACKERS.get(packed[0])
        if unpacker is None:
            return self._resolve(packed)
        return unpacker(self, packed, depth + 1)

    def items(self, packed: Any, depth: int) -> list[Any]:
        if type(packed) is not list:
            raise MalformedError("no items")
        return [self.unpack(part, depth) for part in packed]

    def pairs(self, packed: Any, depth: int) -> dict[Any, Any]:
        flat = self.items(packed, depth)
        if len(flat) % 2:
            raise MalformedError("a key without a value")
        return dict(zip(_hashable(flat[::2]), flat[1::2], strict=True))

    def whole(self, packed: Any, depth: int) -> int:
        value = self.unpack(packed, depth)
        if type(value) is not int:
            raise MalformedError("not an integer")
        return value


def _hashable(items: list[Any]) -> list[Any]:
    """Refuses keys that were made to collide: a set of them takes the square of their number."""
    if len(items) > COLLISIONS and max(collections.Counter(map(hash, items)).values()) > COLLISIONS:
        raise MalformedError("keys that collide")
    return items


def _range(decoder: _Decoder, packed: list[Any], depth: int) -> range:
    start, stop, step = (decoder.whole(part, depth) for part in packed[1:4])
    if abs(stop - start) > RANGE * abs(step):
        raise MalformedError("a range beyond the bound")
    return range(start, stop, step)


def _hex(decoder: _Decoder, packed: list[Any], depth: int) -> int:
    if type(packed[1]) is not str or len(packed[1]) > HEX_DIGITS + 3:
        raise MalformedError("a long integer beyond the bound")
    return int(packed[1], 16)


def _text(packed: Any) -> str:
    if type(packed) is not str:
        raise MalformedError("not text")
    return packed


def _decimal(decoder: _Decoder, packed: list[Any], depth: int) -> decimal.Decimal:
    text = _text(packed[1])
    exponent = text.upper().partition("E")[2]
    if len(text) > EXPONENT or len(exponent) > 7 or abs(int(exponent or 0)) > EXPONENT:
        raise MalformedError("a decimal beyond the bound")
    return decimal.Decimal(text)


def _offset(packed: Any) -> datetime.timezone | None:
    if packed is None:
        return None
    days, seconds, microseconds = packed
    return datetime.timezone(datetime.timedelta(days=days, seconds=seconds, microseconds=microseconds))


def _numbers(packed: list[Any], count: int) -> list[int]:
    if len(packed) < count or any(type(number) is not int or abs(number) > 10**10 for number in packed[:count]):
        raise MalformedError("not numbers of a date")
    return packed[:count]


def _time(decoder: _Decoder, packed: list[Any], depth: int) -> datetime.time:
    hour, minute, second, microsecond, fold = _numbers(packed[1:], 5)
    return datetime.time(hour, minute, second, microsecond, _offset(packed[6]), fold=fold)


def _datetime(decoder: _Decoder, packed: list[Any], depth: int) -> datetime.datetime:
    year, month, day, hour, minute, second, microsecond, fold = _numbers(packed[1:], 8)
    zone = _offset(packed[9])
    return datetime.datetime(year, month, day, hour, minute, second, microsecond, zone, fold=fold)


@functools.lru_cache(maxsize=256)
def _tuple_class(name: str, fields: tuple[str, ...]) -> Any:
    return collections.namedtuple(name, fields)


def _named_tuple(decoder: _Decoder, packed: list[Any], depth: int) -> Any:
    name, fields = _text(packed[1]), tuple(packed[2])
    words = (name, *fields)
    if len(fields) > FIELDS or not all(
        type(word) is str
        and word.isascii()
        and len(word) <= 100
        and word.isidentifier()
        and not keyword.iskeyword(word)
        for word in words
    ):
        raise MalformedError("not names of a tuple")
    return _tuple_class(name, fields)(*decoder.items(packed[3], depth))


def _deque(decoder: _Decoder, packed: list[Any], depth: int) -> collections.deque[Any]:
    longest = None if packed[1] is None else decoder.whole(packed[1], depth)
    return collections.deque(decoder.items(packed[2], depth), longest)


def _default_dict(decoder: _Decoder, packed: list[Any], depth: int) -> Any:
    factory: Any = None if packed[1] is None else TYPES[packed[1]]
    return collections.defaultdict(factory, decoder.pairs(packed[2], depth))


_UNPACKERS: dict[str, Callable[[_Decoder, list[Any], int], Any]] = {
    "i": _hex,
    "l": lambda u, p, d: u.items(p[1], d),
    "t": lambda u, p, d: tuple(u.items(p[1], d)),
    "u": lambda u, p, d: _text(p[1]).encode("latin-1").decode("utf-8", "surrogatepass"),
    "s": lambda u, p, d: set(_hashable(u.items(p[1], d))),
    "f": lambda u, p, d: frozenset(_hashable(u.items(p[1], d))),
    "dk": lambda u, p, d: dict.fromkeys(_hashable(u.items(p[1], d))).keys(),
    "dv": lambda u, p, d: dict(enumerate(u.items(p[1], d))).values(),
    "di": lambda u, p, d: dict(u.items(p[1], d)).items(),
    "d": lambda u, p, d: u.pairs(p[1], d),
    "od": lambda u, p, d: collections.OrderedDict(u.pairs(p[1], d)),
    "C": lambda u, p, d: collections.Counter(u.pairs(p[1], d)),
    "dd": _default_dict,
    "dq": _deque,
    "b": lambda u, p, d: _text(p[1]).encode("latin-1"),
    "ba": lambda u, p, d: bytearray(_text(p[1]).encode("latin-1")),
    "c": lambda u, p, d: complex(p[1], p[2]),
    "r": _range,
    "D": _decimal,
    "F": lambda u, p, d: fractions.Fraction(u.whole(p[1], d), u.whole(p[2], d)),
    "date": lambda u, p, d: datetime.date(*_numbers(p[1:], 3)),
    "time": _time,
    "datetime": _datetime,
    "delta": lambda u, p, d: datetime.timedelta(*_numbers(p[1:], 3)),
    "nt": _named_tuple,
    "T": lambda u, p, d: TYPES[p[1]],
    "e": lambda u, p, d: _SINGLES[p[1]],
}
