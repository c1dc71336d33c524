# ruff: noqa: E501
"""What honest programs may return and do across the border, and what hostile bytes can do to the decoder: nothing."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from datetime import time as clock
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenloop.sandbox import Limits, SandboxVerifier
from greenloop.sandbox.inside import locks, wire
from greenloop.types import Outcome, Task, Verdict


@pytest.fixture(scope="module")
def verifier() -> Iterator[SandboxVerifier]:
    with SandboxVerifier(Limits(cpu_s=1.0, wall_s=4.0), workers=1) as judge:
        yield judge


def judged(verifier: SandboxVerifier, program: str, *tests: str, setup: str = "") -> Verdict:
    task = Task(task_id="t", statement="", entry_point="f", tests=tests, setup=setup)
    return verifier.submit(task, program).result()


# Honest programs: what plain Python accepts is accepted.

HONEST = {
    "float that is an integer": ("def f(): return 2.0", "assert f() == 2"),
    "infinities": ("def f(): return [float('inf'), -float('inf')]", "assert f() == [float('inf'), float('-inf')]"),
    "not a number": ("def f(): return float('nan')", "v = f()\nassert v != v"),
    "minus zero": ("def f(): return -0.0", "assert math.copysign(1, f()) == -1"),
    "big integers": ("def f(n): return 7 ** n", "assert f(40_000) == 7 ** 40_000", "assert f(100) == 7 ** 100"),
    "bytes": ("def f(): return b'\\x00\\xff', bytearray(b'a')", "assert f() == (b'\\x00\\xff', bytearray(b'a'))"),
    "text": ("def f(): return '\\u2603\\ud800\\x00'", "assert f() == '\\u2603\\ud800\\x00'"),
    "sets": ("def f(): return {1, 'a', (2, 3)}, frozenset({4})", "assert f() == ({'a', (2, 3), 1}, frozenset([4]))"),
    "tuples stay tuples": ("def f(): return [(1, 2), [3]]", "assert f() == [(1, 2), [3]]", "assert f() != [[1, 2], [3]]"),
    "dict order": ("def f(): return {'b': 1, 'a': 2}", "assert list(f()) == ['b', 'a']"),
    "counter": ("from collections import Counter\ndef f(): return Counter('aab')", "assert f().most_common(1) == [('a', 2)]"),
    "defaultdict": ("from collections import defaultdict\ndef f(): return defaultdict(list, a=[1])", "assert f()['b'] == []"),
    "ordered dict": ("from collections import OrderedDict\ndef f(): return OrderedDict(a=1)", "assert f() == {'a': 1}"),
    "deque": ("from collections import deque\ndef f(): return deque([1, 2, 3], 2)", "v = f()\nassert v.maxlen == v[0] == 2"),
    "named tuple": ("from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)",
                    "assert f() == (1, 2)", "assert f().y == 2"),
    "range": ("def f(): return range(3, 9, 2)", "assert list(f()) == [3, 5, 7]"),
    "complex": ("def f(): return 1 + 2j", "assert f() == complex(1, 2)"),
    "decimal": ("from decimal import Decimal\ndef f(): return Decimal('1.10')", "assert str(f()) == '1.10'"),
    "fraction": ("from fractions import Fraction\ndef f(): return Fraction(2, 6)", "assert f() == fractions.Fraction(1, 3)"),
    "dates": ("import datetime as d\ndef f(): return d.date(2024, 2, 29), d.timedelta(-1, 5)",
              "assert f()[0].isoformat() == '2024-02-29'", "assert f()[1].total_seconds() == -86395"),
    "aware moment": ("import datetime as d\ndef f(): return d.datetime(2024, 1, 1, tzinfo=d.timezone.utc)",
                     "assert f().isoformat() == '2024-01-01T00:00:00+00:00'"),
    "subclass of int": ("class I(int): pass\ndef f(): return I(7)", "assert f() == 7"),
    "enum of int": ("from enum import IntEnum\nclass E(IntEnum):\n    A = 3\ndef f(): return E.A", "assert f() == 3"),
    "subclass of list": ("class L(list): pass\ndef f(): return L([1])", "assert f() == [1]"),
    "dict views": ("def f(): return {'a': 1}.keys()", "assert list(f()) == ['a']"),
    "closure": ("def f(n):\n    def add(x): return x + n\n    return add", "assert f(2)(3) == 5"),
    "generator": ("def f(n):\n    for i in range(n): yield i * i", "assert list(f(3)) == [0, 1, 4]", "assert next(f(2)) == 0"),
    "endless generator": ("def f():\n    i = 0\n    while True:\n        yield i\n        i += 1",
                          "assert list(itertools.islice(f(), 3)) == [0, 1, 2]"),
    "iterator": ("def f(xs): return iter(xs)", "assert sum(f([1, 2, 3])) == 6"),
    "map and zip": ("def f(xs): return map(str, xs)", "assert list(f([1, 2])) == ['1', '2']"),
    "list changed in place": ("def f(xs): xs.sort()", "v = [3, 1]\nf(v)\nassert v == [1, 3]"),
    "dict changed in place": ("def f(d): d['b'] = d.pop('a')", "v = {'a': 1}\nf(v)\nassert v == {'b': 1}"),
    "set changed in place": ("def f(s): s.add(2)", "v = {1}\nf(v)\nassert v == {1, 2}"),
    "the same list comes back": ("def f(xs):\n    xs.append(1)\n    return xs", "v = []\nassert f(v) is v and v == [1]"),
    "a function as argument": ("def f(g, xs): return [g(x) for x in xs]", "assert f(lambda x: x * 2, [1, 2]) == [2, 4]"),
    "a key function that raises": ("def f(g):\n    try: return g(0)\n    except ZeroDivisionError: return 'zero'",
                                   "assert f(lambda x: 1 // x) == 'zero'"),
    "a function that calls the program back": ("def f(g, n): return n if n < 1 else g(n - 1) + 1", "assert f(lambda n: f(None, 0) + n, 3) == 3"),
    "writing to the null device": ("import os\ndef f():\n    with open(os.devnull, 'w') as n: print(1, file=n)\n    return 1", "assert f() == 1"),
    "asyncio": ("import asyncio\nasync def g(x):\n    await asyncio.sleep(0)\n    return x + 1\ndef f(x): return asyncio.run(g(x))", "assert f(1) == 2"),
    "only an exception": ("def f(x):\n    raise ValueError", "try: f(1)\nexcept ValueError: pass\nelse: assert False"),
    "views of a dict": ("def f(d): return d.keys(), d.values(), d.items()", "k, v, i = f({'a': 1})\nassert k == {'a'} and list(v) == [1] and v != [1] and i == {('a', 1)}"),
    "deep mutual recursion": ("def f(g, n): return g(n)", "def g(n): return n if n == 0 else 1 + f(g, n - 1)\nassert f(g, 100) == 100"),
    "a keyword changed in place": ("def f(a): a.sort()", "a = [3, 1]\nf(a=a)\nassert a == [1, 3]"),
    "a built-in type as entry point": ("f = int", "assert f('7') == 7"),
    "lone surrogates": ("def f(): return '\\ud83d' + '\\ude00'", "assert f() == '\\ud83d' + '\\ude00'"),
    "not a number in a list": ("def f(): return [float('nan')]", "assert f() == [math.nan]"),
    "a copied object": ("class A:\n    x = 1\ndef f(): return A()", "assert copy.deepcopy(f()).x == 1"),
    "a type as argument": ("def f(kind, xs): return [x for x in xs if isinstance(x, kind)]", "assert f(str, ['a', 1]) == ['a']"),
    "an expected exception": ("def f(x):\n    raise ValueError('no ' + x)",
                              "try: f('a')\nexcept ValueError as e: assert str(e) == 'no a'\nelse: assert False",
                              ),
    "an exception of its own": ("class Bad(KeyError): pass\ndef f():\n    raise Bad('k')", "try: f()\nexcept KeyError: pass"),
    "keywords": ("def f(a, *, b=2): return a, b", "assert f(a=1) == (1, 2)", "assert f(1, b=3) == (1, 3)"),
    "objects": ("class P:\n    def __init__(self, x): self.x = x\n    def twice(self): return 2 * self.x\ndef f(p): return P(p.x + 1)",
                "v = f(P(1))\nassert v.x == 2 and v.twice() == 4 and isinstance(v, P)"),
    "a tree built by the test": ("class N:\n    def __init__(self, v): self.v, self.left = v, None\n"
                                 "def f(n): return 0 if n is None else 1 + f(n.left)",
                                 "r = N(1)\nr.left = N(2)\nassert f(r) == 2"),
    "truth of an object": ("import re\ndef f(s): return re.match('a+', s)", "assert f('aa')", "assert not f('b')"),
    "deep but honest": ("def f(n):\n    v = []\n    for _ in range(n): v = [v]\n    return v", "assert f(40)[0][0] != []"),
    "a large value": ("def f(n): return list(range(n))", "assert len(f(200_000)) == 200_000"),
    "builtins and constants of the program": ("LIMIT = 3\ndef f(x): return x < LIMIT", "assert f(2) and LIMIT == 3"),
}  # fmt: skip


@pytest.mark.parametrize(("program", "tests"), [(p, t) for p, *t in HONEST.values()], ids=HONEST.keys())
def test_what_plain_python_accepts_is_accepted(verifier: SandboxVerifier, program: str, tests: list[str]):
    verdict = judged(verifier, program, *tests)
    assert verdict.outcome is Outcome.PASSED, verdict.detail


# Dishonest values

LIES = {
    "equal to everything": "class T:\n    def __eq__(self, o): return True\n    def __hash__(self): return 2\ndef f(x): return T()",
    "a list of them": "class T:\n    def __eq__(self, o): return True\ndef f(x): return [T()]",
    "an integer that lies": "class I(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\ndef f(x): return I(7)",
    "a lying class": "class T:\n    @property\n    def __class__(self): return int\n    def __eq__(self, o): return True\ndef f(x): return T()",
    "NotImplemented": "def f(x): return NotImplemented",
    "a patched dumps": "import json\njson.dumps = lambda *a, **k: '[\"t\",[\"value\",2]]'\ndef f(x): return None",
    "a type": "def f(x): return int",
}  # fmt: skip


@pytest.mark.parametrize("program", LIES.values(), ids=LIES.keys())
def test_a_lying_value_equals_nothing(verifier: SandboxVerifier, program: str):
    verdict = judged(verifier, program, "assert f(1) == 2", "assert f(1) == [2]", "assert 3 == f(1)")
    assert verdict.outcome in (Outcome.FAILED, Outcome.ERROR, Outcome.CRASHED)
    assert verdict.tests_passed == 0


FRAMES = [
    b'["t",["value",["D","1e99999999"]]]',
    b'["t",["value",["F",1,0]]]',
    b'["t",["value",["i","' + b"f" * 300_000 + b'"]]]',
    b'["t",["value",' + b"[" * 100_000 + b"]" * 100_000 + b"]]",
    b'["t",["value",["d",[["l",[]],1]]]]',
    b'["t",["value",["nt","P",["__class__","x"],[1,2]]]]',
    b'["t",["value",["nt","P);import os;(",["x"],[1]]]]',
    b'["t",["value",["r",0,1,0]]]',
    b'["t",["value",["r",0,10000000000000,1]]]',
    b'["t",["value",["nt","X",["a","\xef\xbd\x81"],[1,2]]]]',
    b'["t",["value",["s",[' + ",".join(f'["i","{hex(i * (2**61 - 1))}"]' for i in range(30_000)).encode() + b"]]]]",
    b'["t",["value",["h",-1,"x"]]]',
    b'["t",["value",["datetime",1,2]]]',
    b'["t",["value",["T","open"]]]',
    b'["t",["value",12345678901234567890123]]',
    b'["t",["callback",7,["l",[]],["d",[]]]]',
    b'["t",["verdict","passed"]]',
    b'["l",[]]',
    b"[]",
    b"{}",
    b"\xff\xfe",
]


@pytest.mark.parametrize("frame", FRAMES)
def test_a_forged_frame_ends_the_conversation(verifier: SandboxVerifier, frame: bytes):
    program = f"import os, struct\ndef f(x):\n    data = {frame!r}\n    os.write(3, struct.pack('>I', len(data)) + data)\n    return 2"
    started = time.monotonic()
    verdict = judged(verifier, program, "assert f(1) == 2")
    assert verdict.outcome in (Outcome.CRASHED, Outcome.ERROR)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("level", ["reads", "imports"])
def test_the_hidden_tests_of_the_package_are_out_of_reach(verifier: SandboxVerifier, level: str):
    """The starter set lies among the installed packages, perhaps beside the standard library."""
    from greenloop.tasks import embedded

    folder = str(Path(embedded.__file__).parent / "starter")
    assert any(name.endswith(".jsonl") for name in os.listdir(folder))
    reach = f"open({folder!r} + '/lists.jsonl').read()" if level == "reads" else "__import__('greenloop')"
    program = f"def f():\n    try: return {reach} and 'reached'\n    except (OSError, ImportError): return 'refused'"
    assert judged(verifier, program, "assert f() == 'refused'").outcome is Outcome.PASSED


def test_a_test_cannot_hand_the_judges_interpreter_to_the_program(verifier: SandboxVerifier):
    verdict = judged(verifier, "def f(g): return g('1 + 1')", "assert f(eval) == 2")
    assert verdict.outcome is Outcome.ERROR
    assert "cannot be passed" in verdict.detail


def test_tests_cannot_reach_the_machine_either(verifier: SandboxVerifier):
    reach = "f(1)\nimport os, socket\ntry: {}\nexcept OSError: pass\nelse: assert False, 'reached'"
    for action in ("open('/etc/passwd')", "open('/tmp/x', 'w')", "socket.socket()", "os.fork()", "os.kill(1, 0)"):
        assert judged(verifier, "def f(x): return x", reach.format(action)).outcome is Outcome.PASSED, action


# The encoding by itself


class Colour(IntEnum):
    RED = 1


Point = namedtuple("Point", "x y")
VALUES = [
    None, True, 0, -1, 2**63, -(2**70), 1.5, math.inf, "", "a\ud800", b"\x00\xff", bytearray(b"x"), [], [1, [2]], (), (1,),
    {1, 2}, frozenset({3}), {"a": {1: 2}}, range(5), 1j, Decimal("-1.5E+10"), Decimal("NaN").copy_sign(Decimal(1)) and Decimal("Infinity"),
    Fraction(1, 3), date(2024, 2, 29), clock(1, 2, 3, 4), clock(1, tzinfo=UTC), datetime(2024, 1, 1, 12, fold=1),
    datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=-5))), timedelta(days=-3, microseconds=7), Counter("aab"),
    OrderedDict(a=1), defaultdict(int, a=1), deque([1], 3), Point(1, 2), int, ValueError, Ellipsis, NotImplemented,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_comes_back_with_its_type(value: object):
    back = wire.loads(wire.dumps(value))
    assert back == value
    if not isinstance(value, Point):
        assert type(back) is type(value)


def test_what_is_more_than_a_built_in_comes_back_as_the_built_in():
    class Liar(str):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = str.__hash__

    assert type(wire.loads(wire.dumps(Liar("a")))) is str
    assert type(wire.loads(wire.dumps(Colour.RED))) is int


leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.decimals(allow_nan=False)
    | st.fractions() | st.dates() | st.times() | st.datetimes() | st.timedeltas() | st.complex_numbers(allow_nan=False)
)  # fmt: skip
hashable = st.recursive(leaves, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=5)
values = st.recursive(
    hashable,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(hashable, inner, max_size=4) | st.sets(hashable, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(values)
def test_every_value_of_these_kinds_survives_the_round_trip(value: object):
    assert wire.loads(wire.dumps(value)) == value


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=6) | st.sampled_from([*"itlsfdDFrbchTeC"]),
    lambda inner: st.lists(inner, max_size=5), max_leaves=20,
).map(lambda tree: json.dumps(tree).encode()))  # fmt: skip
def test_any_bytes_are_a_value_or_malformed(data: bytes):
    started = time.monotonic()
    with contextlib.suppress(wire.MalformedError):
        wire.loads(data)
    assert time.monotonic() - started < 1


def test_what_is_beyond_the_bounds_is_not_sent():
    deep: list[object] = []
    for _ in range(100):
        deep = [deep]
    for value in (deep, "x" * (9 << 20), 1 << (5 << 20), list(range(wire.NODES + 1)), object()):
        with pytest.raises(wire.UnencodableError):
            wire.dumps(value)


# The filter by itself


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_allows_what_is_listed_and_nothing_else(machine: str):
    """The BPF program, run by a small interpreter of it."""
    program = locks.seccomp_filter(machine, may_open=True, may_judge=False)
    arch, special = locks._AUDIT_ARCH[machine], locks._SPECIAL[machine]
    allowed = {*locks._COMMON[machine], *locks._OPENING[machine]}
    for number in range(600):
        if number in special.values():
            continue
        expected = locks._ALLOW if number in allowed else locks._ERRNO | 1
        assert bpf(program, number, arch) == expected, number
    assert bpf(program, 0, arch ^ 1) == locks._KILL
    assert bpf(program, special["clone"], arch, 0x10000) == locks._ALLOW
    assert bpf(program, special["clone"], arch, 0x11) == locks._ERRNO | 1
    assert bpf(program, special["clone3"], arch) == locks._ERRNO | 38
    assert bpf(program, special["ioctl"], arch, 1, 0x5401) == locks._ALLOW
    assert bpf(program, special["ioctl"], arch, 1, 0x5412) == locks._ERRNO | 1
    assert (
        bpf(program, special["fcntl"], arch, 2, 4)
        == bpf(program, special["ioctl"], arch, 0, 0x5421)
        == locks._ERRNO | 1
    )
    assert [bpf(program, special["fcntl"], arch, 3, c) == locks._ALLOW for c in (1, 4, 5, 6, 1030, 1031)] == [
        True, True, False, False, True, False,
    ]  # fmt: skip
    assert bpf(program, special["prlimit64"], arch, 0, 7, 0) == locks._ALLOW
    assert bpf(program, special["prlimit64"], arch, 0, 7, 1) == locks._ERRNO | 1
    assert bpf(program, special["prlimit64"], arch, 0, 7, 1 << 32) == locks._ERRNO | 1
    assert bpf(program, special["ioctl"], arch, 3, 0x5421) == locks._ALLOW
    pairs = {(1, 1): True, (1, 1 | 0x80800): True, (1, 2): False, (1, 5): False, (2, 1): False}
    for (family, kind), fine in pairs.items():
        assert (bpf(program, special["socketpair"], arch, family, kind) == locks._ALLOW) == fine
    assert bpf(program, special["sendto"], arch, 4, 7, 1, 0, 0) == locks._ALLOW
    assert bpf(program, special["sendto"], arch, 4, 7, 1, 0, 7) == locks._ERRNO | 1
    assert bpf(program, special["sendto"], arch, 4, 7, 1, 0, 1 << 40) == locks._ERRNO | 1
    assert all(bpf(program, number, arch) == locks._ERRNO | 1 for number in locks._JUDGING[machine])
    judging = locks.seccomp_filter(machine, may_open=False, may_judge=True)
    assert all(bpf(judging, number, arch) == locks._ALLOW for number in locks._JUDGING[machine])
    assert all(bpf(judging, number, arch) == locks._ERRNO | 1 for number in locks._OPENING[machine])
    if machine == "x86_64":
        assert bpf(program, 0x40000000, arch) == locks._KILL


@pytest.mark.parametrize("may_open", [True, False])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_two_filters_of_a_program_together_are_the_whole_one(machine: str, may_open: bool):
    """The fork server's filter and the one each process adds; the kernel takes the stricter answer."""
    whole = locks.seccomp_filter(machine, may_open=may_open)
    server = locks.seccomp_filter(machine, may_open=may_open, may_serve=True)
    added = locks.program_filter(machine)
    arch, special = locks._AUDIT_ARCH[machine], locks._SPECIAL[machine]
    arguments = [
        (),
        (0x10000,),
        (0x11,),
        (0, 7, 0, 1),
        (0, 7, 1),
        (0, 7, 1 << 32),
        (1, 1),
        (2, 1),
        (1, 0x5401),
        (1, 0x5412),
    ]
    for number in (*range(600), 0x40000000):
        for values in arguments:
            answers = (bpf(server, number, arch, *values), bpf(added, number, arch, *values))
            strictest = min(answers, key=signed)
            assert strictest == bpf(whole, number, arch, *values), (number, values)
    for number in (*locks._SERVING[machine], special["clone"], special["prlimit64"]):
        assert bpf(server, number, arch, 0x11, 7, 1) == locks._ALLOW
    assert bpf(server, 0, arch ^ 1) == locks._KILL


def signed(answer: int) -> int:
    """As the kernel compares answers: to end the process is the lowest."""
    return answer - (answer >> 31 << 32)


def bpf(program: bytes, number: int, arch: int, *arguments: int) -> int:
    import struct

    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("=IIQ6Q", number, arch, 0, *padded)
    instructions = list(struct.iter_unpack("=HBBI", program))
    at, accumulator = 0, 0
    while True:
        code, jump_true, jump_false, k = instructions[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, k)
        elif code == 0x54:
            accumulator &= k
        elif code == 0x06:
            return int(k)
        else:
            holds = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[code]
            at += jump_true if holds else jump_false


# What a review of the fork server found


def test_a_program_that_answers_after_its_time_does_not_pass():
    """It used its time up between two looks at its clock."""
    slow = (
        "import time\ndef f(x):\n    end = 0.05 if x == 1 else 0.29\n    started = time.process_time()\n"
        "    while time.process_time() - started < end: pass\n    return x + 1\n"
    )
    task = Task(task_id="t", statement="", entry_point="f", tests=("assert f(1) == 2", "assert f(2) == 3"))
    with SandboxVerifier(Limits(cpu_s=0.3, wall_s=5), workers=1) as verifier:
        verdict = verifier.submit(task, slow).result()
    assert verdict.outcome is Outcome.TIMEOUT, verdict


def test_what_honest_programs_do_in_bulk_is_not_slowed_down():
    """Every `id` is an audit event: a hook in the process would take these 2 million to seconds."""
    busy = "def f(x):\n    for i in range(2_000_000): id(i)\n    return x + 1\n"
    task = Task(task_id="t", statement="", entry_point="f", tests=("assert f(1) == 2",))
    with SandboxVerifier(workers=1) as verifier:
        verdict = verifier.submit(task, busy).result()
    started = time.process_time()
    exec(busy + "f(1)", {})
    assert verdict.outcome is Outcome.PASSED
    assert verdict.cpu_s < 4 * (time.process_time() - started)


def test_programs_leave_one_another_no_note_in_the_descriptors_that_they_share():
    leaving = (
        "import fcntl, os\ndef f(x):\n    try: fcntl.fcntl(0, 4, fcntl.fcntl(0, 3) | os.O_NONBLOCK)\n"
        "    except OSError: return 'refused'\n    return 'left'\n"
    )
    task = Task(task_id="t", statement="", entry_point="f", tests=("assert f(1) == 'refused'",))
    with SandboxVerifier(workers=1) as verifier:
        assert verifier.submit(task, leaving).result().outcome is Outcome.PASSED


def test_a_process_in_waiting_that_died_is_replaced():
    task = Task(task_id="t", statement="", entry_point="f", tests=("assert f(1) == 2",))
    with SandboxVerifier(workers=1) as verifier:
        for _ in range(3):
            assert verifier.submit(task, "def f(x): return x + 1").result().outcome is Outcome.PASSED
            server = children(verifier._idle[0].process.pid)[0]
            while len(children(server)) > 1:  # the last program is being reaped
                time.sleep(0.01)
            waiting = children(server)[0]
            os.kill(waiting, signal.SIGKILL)
            while " Z " not in Path(f"/proc/{waiting}/stat").read_text():
                time.sleep(0.01)


def children(pid: int) -> list[int]:
    text = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [int(word) for word in text.split()]


THREADS = """
import ctypes, time
def f(x):
    libc = ctypes.CDLL(None)
    entry = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: time.sleep(60))
    thread = ctypes.c_ulong()
    while libc.pthread_create(ctypes.byref(thread), None, entry, None) == 0: pass
    time.sleep(2)
    return x + 1
"""


@pytest.mark.skipif(os.getuid() != 0, reason="limits of another user are set by root")
def test_a_program_with_all_threads_that_there_may_be_costs_no_other_its_verdict():
    """Under a low limit for the user whom root's programs get."""
    script = f"""
from greenloop.sandbox import SandboxVerifier
from greenloop.types import Task
task = Task(task_id="t", statement="", entry_point="f", tests=("assert f(1) == 2",))
with SandboxVerifier(workers=2) as verifier:
    greedy = verifier.submit(task, {THREADS!r})
    honest = [verifier.submit(task, "def f(x): return x + 1") for _ in range(40)]
    print({{verdict.result().outcome.value for verdict in honest}})
    greedy.result()
    print(verifier.submit(task, "def f(x): return x + 1").result().outcome.value)
"""
    command = ["prlimit", "--nproc=300:300", sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == ["{'passed'}", "passed"]
