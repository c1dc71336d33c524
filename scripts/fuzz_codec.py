"""Coverage-guided fuzzing of what a hostile program can send the judge: values and frames.

    pip install atheris
    python scripts/fuzz_codec.py --seconds 600            # ends with exit status 0 if nothing was found
    python scripts/fuzz_codec.py --planted --seconds 120  # finds a bug planted for the purpose, exit status 77

Half of the inputs are bytes as they come, half are built into trees of the encoding's own tags, so that the fuzzer is
not kept busy by the JSON syntax. For each: `wire.loads` returns or raises MalformedError; what it returns is made of
exact built-in types within the bounds, is encoded again, and comes back the same; `Talk.receive` returns a tuple or
ends the conversation. An input that takes more than two seconds or 1 GiB is a finding.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, ItemsView, KeysView, ValuesView
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["greenloop.sandbox"]):
    from greenloop.sandbox.inside import talk, wire
    from greenloop.sandbox.inside.proxy import Handle

LIMITS = {"cpu_s": 60.0, "wall_s": 60.0}
EXACT = {
    type(None), bool, int, float, str, bytes, bytearray, complex, list, tuple, set, frozenset, dict, range,
    type(...), type(NotImplemented), type({}.keys()), type({}.values()), type({}.items()), Counter, OrderedDict,
    defaultdict, deque, Decimal, Fraction, date, time, datetime, timedelta, type, Handle,
}  # fmt: skip
TAGS = [*wire._UNPACKERS, "h", "cb", "?"]
NUMBERS = (0, 1, -1, 2, 63, 1 << 31, (1 << 63) - 1, -(1 << 63), 1 << 63, 10_000_000, 10_000_001, -10_000_001)
TEXTS = ("", "0x1", "-0xff", "1E5", "-1E20001", "nan", "sNaN", "list", "ValueError", "a", "class", "\ud800", "x" * 99)
SEEDS = (
    1, "a", [1, (2.5, {3})], {"k": None}, 1 << 80, b"\xff", Decimal("1.5"), Fraction(1, 3), range(0, 9, 2),
    Counter("aab"), deque([1], 3), defaultdict(list, a=[1]), datetime(2024, 2, 29), timedelta(1, 2), 1j,
    frozenset({1}), ValueError, "\ud800",
)  # fmt: skip


class Line:
    """A socket's end on which the given bytes arrive, and then nothing more."""

    def __init__(self, data: bytes) -> None:
        self.rest = data

    def settimeout(self, seconds: float) -> None:
        """Nothing to wait for."""

    def recv(self, count: int) -> bytes:
        """Up to seven bytes, so that frames come in pieces."""
        chunk, self.rest = self.rest[: min(count, 7)], self.rest[min(count, 7) :]
        return chunk

    def sendall(self, data: bytes) -> None:
        """Swallowed."""


def one_input(data: bytes) -> None:
    """Decode one input in all ways that a judge would."""
    provider = atheris.FuzzedDataProvider(data)
    if provider.ConsumeBool():
        text = json.dumps(tree(provider, 0)).encode()
    else:
        text = provider.ConsumeBytes(provider.remaining_bytes())
    check_value(text)
    check_talk(len(text).to_bytes(4, "big") + text)
    check_talk(data)


@atheris.instrument_func
def tree(provider: Any, depth: int) -> Any:
    """A packed value, mostly of the right shape."""
    kind = provider.ConsumeIntInRange(0, 6) if depth else 5
    if depth > 6 or kind == 0 or not provider.remaining_bytes():
        return (None, True, 1.5, float("nan"))[provider.ConsumeIntInRange(0, 3)]
    if kind == 1:
        return provider.PickValueInList(list(TEXTS))
    if kind == 2:
        return provider.PickValueInList(list(NUMBERS))
    if kind == 3:
        return provider.ConsumeInt(9)
    if kind == 4:
        return [tree(provider, depth + 1) for _ in range(provider.ConsumeIntInRange(0, 4))]
    parts = [tree(provider, depth + 1) for _ in range(provider.ConsumeIntInRange(0, 9))]
    return [provider.PickValueInList(TAGS), *parts]


def check_value(text: bytes) -> None:
    """`loads` and back."""
    line = talk.Talk(Line(b""), 1, LIMITS)
    try:
        value = wire.loads(text, line.resolve)
    except (wire.MalformedError, MemoryError):
        return
    check_bounds(value, 0)
    try:
        again = wire.dumps(value, lambda handle: ["h", handle._number, handle._name, True])
    except wire.UnencodableError:
        return
    assert canonical(wire.loads(again, line.resolve)) == canonical(value), "not the same after a round trip"


def canonical(value: Any) -> Any:
    """Equal for equal values of equal types: sets have no order, NaN is itself."""
    kind = type(value).__name__
    if isinstance(value, set | frozenset):
        return kind, sorted(repr(canonical(item)) for item in value)
    if isinstance(value, dict):
        return kind, [(canonical(key), canonical(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | deque | KeysView | ValuesView | ItemsView):
        return kind, [canonical(item) for item in value]
    return kind, value._number if isinstance(value, Handle) else repr(value)


def check_bounds(value: Any, depth: int) -> None:
    """Exact types, and nothing larger than the bounds say."""
    kind = type(value)
    assert kind in EXACT or value in wire.TYPES.values() or is_named_tuple(value), f"a value of {kind}"
    assert depth <= 2 * wire.DEPTH + 2, "too deep"
    if kind is int:
        assert value.bit_length() <= 4 * (wire.HEX_DIGITS + 3), "an integer beyond the bound"
    elif kind is range:
        assert (value.stop - value.start) // value.step <= wire.RANGE + 1, "a range beyond the bound"
    elif kind is Decimal and value.is_finite():
        assert abs(value.adjusted()) <= 3 * wire.EXPONENT, "a decimal beyond the bound"
    elif isinstance(value, dict):
        for key, item in value.items():
            check_bounds(key, depth + 1)
            check_bounds(item, depth + 1)
    elif isinstance(value, list | tuple | set | frozenset | deque):
        for item in value:
            check_bounds(item, depth + 1)


def is_named_tuple(value: Any) -> bool:
    """Made by `collections.namedtuple`."""
    return isinstance(value, tuple) and type(value).__bases__ == (tuple,) and hasattr(value, "_fields")


def check_talk(data: bytes) -> None:
    """The judge's side of a conversation in which these bytes arrive."""
    line = talk.Talk(Line(data), 1, LIMITS)
    line.cpu_s = lambda: 0.0  # type: ignore[method-assign]
    try:
        while True:
            frame = line.receive()
            assert type(frame) is tuple, "no frame"
    except talk.EndedError:
        return


@atheris.instrument_func
def planted_range(decoder: Any, packed: list[Any], depth: int) -> range:
    """As `wire._range`, but blind to ranges that count down: the bound forgets the sign of the step."""
    start, stop, step = (decoder.whole(part, depth) for part in packed[1:4])
    if stop - start > wire.RANGE * step > 0:
        raise wire.MalformedError("a range beyond the bound")
    return range(start, stop, step)


def main() -> None:
    """Fuzz for the given time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--planted", action="store_true", help="with a bug to be found")
    options = parser.parse_args()
    if options.planted:
        unpackers: dict[str, Callable[..., Any]] = wire._UNPACKERS
        unpackers["r"] = planted_range
    corpus = Path(tempfile.mkdtemp(prefix="fuzz-codec-"))
    for number, value in enumerate(SEEDS):
        (corpus / f"seed-{number}").write_bytes(b"\0" + wire.dumps(value))
    bounds = [
        f"-max_total_time={options.seconds}",
        "-timeout=2",
        "-rss_limit_mb=1024",
        "-max_len=1024",
        "-len_control=0",
    ]
    settings = [sys.argv[0], *bounds, f"-artifact_prefix={corpus}/", str(corpus)]
    print(f"corpus and findings in {corpus}")
    atheris.Setup(settings, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
