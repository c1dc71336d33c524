"""The judge: what a program can and cannot make of its verdict."""

import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import wait
from pathlib import Path
from random import Random

import pytest

from greenloop.errors import SandboxError
from greenloop.sandbox import Limits, SandboxVerifier
from greenloop.sandbox.pool import NOTICES
from greenloop.sandbox.transcript import BlockResult, Ending, LoadResult, Transcript, outcome_of, verdict_of
from greenloop.seeding import seed_for
from greenloop.tasks import load_tasks
from greenloop.types import Outcome, Task, Verdict

SUCCESSOR = "def f(x):\n    return x + 1\n"
QUICK = Limits(cpu_s=0.5, wall_s=5.0)


def task(*tests: str, **fields: object) -> Task:
    known = {"task_id": "t", "statement": "", "entry_point": "f", "tests": tests or ("assert f(1) == 2",), **fields}
    return Task(**known)  # type: ignore[arg-type]


THREE = task("assert f(1) == 2", "assert f(41) == 42", hidden_tests=("assert f(-1) == 0",))


def judged(program: str | None, exercise: Task = THREE, limits: Limits = QUICK) -> Verdict:
    with SandboxVerifier(limits, workers=1) as verifier:
        return verifier.submit(exercise, program).result()


def children_of(pid: int) -> set[int]:
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid and state != "Z":
            found.add(int(status.parent.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: object, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.01)
    return bool(condition())  # type: ignore[operator]


# Honest programs


HONEST = {
    "trivial": SUCCESSOR,
    "standard library": "import re, math, collections, decimal\ndef f(x): return int(decimal.Decimal(x)) + 1",
    "prints": "def f(x):\n    for i in range(20000): print('debug', i)\n    return x + 1",
    "recursion": "import sys\nsys.setrecursionlimit(20000)\n"
    "def g(n): return n and 1 + g(n - 1)\ndef f(x): return x + g(3000) - 2999",
    "100 MiB": "def f(x):\n    block = bytearray(100 << 20)\n    return x + 1",
    "main guard": SUCCESSOR + "if __name__ == '__main__': raise ValueError",
    "reads input": "try: input()\nexcept EOFError: pass\n" + SUCCESSOR,
    "threads": "from concurrent.futures import ThreadPoolExecutor\n"
    "def f(x):\n    with ThreadPoolExecutor(2) as pool: return list(pool.map(lambda y: y + 1, [x]))[0]",
    "dataclass with postponed annotations": "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    "@dataclass\nclass P:\n    x: int\ndef f(x): return P(x).x + 1",
    "carriage returns": SUCCESSOR.replace("\n", "\r\n"),
    "300 kB of source": "# " + "x" * 300_000 + "\n" + SUCCESSOR,
}


@pytest.mark.parametrize("program", HONEST.values(), ids=HONEST.keys())
def test_an_honest_program_passes_every_test(program: str) -> None:
    verdict = judged(program, limits=Limits())
    assert verdict.outcome is Outcome.PASSED, verdict.detail
    assert (verdict.tests_passed, verdict.tests_total) == (3, 3)
    assert (verdict.hidden_passed, verdict.hidden_total) == (1, 1)
    assert verdict.ran
    assert verdict.detail == ""
    assert 0 < verdict.cpu_s < 3
    assert 0 < verdict.wall_s < 10


# Outcomes

SPIN = "while True: pass"
STUBBORN = """
import signal
for number in range(1, 65):
    try: signal.signal(number, lambda *a: None)
    except (OSError, ValueError): pass
def f(x):
    while True:
        try:
            while True: pass
        except BaseException: pass
"""

OUTCOMES = [
    # program, outcome, tests passed, ran
    ("def f(x): return 2", Outcome.FAILED, 1, True),
    ("def f(x): return x + 1 if x > 0 else None", Outcome.FAILED, 2, True),
    ("def f(x): return 1 // 0", Outcome.ERROR, 0, True),
    ("def f(x): return x + 1 if x < 41 else 1 // 0", Outcome.ERROR, 2, True),
    ("def f(x):\n    if x == 1: return 0\n    raise ValueError", Outcome.FAILED, 0, True),
    ("def g(x): return x + 1", Outcome.ERROR, 0, True),
    ("def f(x): return (", Outcome.ERROR, 0, False),
    ("raise ValueError\n" + SUCCESSOR, Outcome.ERROR, 0, False),
    ("assert False\n" + SUCCESSOR, Outcome.ERROR, 0, False),
    ("null \0 byte", Outcome.ERROR, 0, False),
    ("'\ud800'; " + SUCCESSOR, Outcome.ERROR, 0, False),
    ("import sys; sys.exit(0)", Outcome.ERROR, 0, False),
    ("def f(x): raise SystemExit(0)", Outcome.ERROR, 0, True),
    ("import os; os._exit(0)", Outcome.CRASHED, 0, False),
    ("def f(x):\n    import os\n    os._exit(0)", Outcome.CRASHED, 0, True),
    ("import os; os.kill(os.getpid(), 9)", Outcome.ERROR, 0, False),
    ("import ctypes; ctypes.string_at(0)", Outcome.CRASHED, 0, False),
    ("import os; os.closerange(0, 100)\n" + SUCCESSOR, Outcome.CRASHED, 0, False),
    (SPIN, Outcome.TIMEOUT, 0, False),
    (STUBBORN, Outcome.TIMEOUT, 0, True),
    ("def f(x): return len(str(9 ** 9 ** 9))", Outcome.TIMEOUT, 0, True),
    (f"def f(x):\n    if x == 41:\n        {SPIN}\n    return x + 1", Outcome.TIMEOUT, 1, True),
    ("x = bytearray(1 << 30)", Outcome.MEMORY, 0, False),
    ("def f(x): return bytearray(1 << 30) if x == 1 else x + 1", Outcome.MEMORY, 2, True),
]


@pytest.mark.parametrize(("program", "outcome", "passed", "ran"), OUTCOMES)
def test_every_end_of_a_program_has_its_outcome(program: str, outcome: Outcome, passed: int, ran: bool) -> None:
    verdict = judged(program)
    assert (verdict.outcome, verdict.tests_passed, verdict.ran) == (outcome, passed, ran), verdict.detail
    assert verdict.tests_total == 3


def test_a_completion_without_code_costs_no_process() -> None:
    verdict = judged(None)
    assert (verdict.outcome, verdict.tests_total, verdict.hidden_total, verdict.cpu_s) == (Outcome.NO_CODE, 3, 1, 0.0)


@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_memory_kept_to_the_last_byte_is_still_reported_as_memory(size: int) -> None:
    program = f"kept = []\ndef f(x):\n    while True: kept.append(bytearray({size}))"
    with SandboxVerifier(Limits(memory_mib=128), workers=1) as verifier:
        verdicts = [verifier.submit(THREE, program).result() for _ in range(10)]
    assert {verdict.outcome for verdict in verdicts} == {Outcome.MEMORY}


def test_the_detail_names_the_first_failing_test_and_why() -> None:
    verdict = judged("def f(x): return x + 1 if x >= 0 else {}['no']")
    assert verdict.detail == "test 3 of 3 (hidden): assert f(-1) == 0: KeyError: 'no'"


def test_the_detail_is_one_short_line_whatever_the_program_says() -> None:
    verdict = judged("def f(x): raise ValueError('long\\nline\\x1b[31m\\u2028' * 10**5)")
    assert len(verdict.detail) <= 300
    assert verdict.detail.isprintable()
    assert verdict.detail.startswith("test 1 of 3: assert f(1) == 2: ValueError: long line\\x1b[31m long")


def test_an_exception_that_cannot_be_printed_is_an_error() -> None:
    program = "class E(Exception):\n    def __str__(self): raise SystemExit\ndef f(x): raise E"
    assert judged(program).outcome is Outcome.ERROR


# Time


def test_the_cpu_limit_is_finer_than_a_second() -> None:
    verdict = judged(SPIN, limits=Limits(cpu_s=0.3))
    assert verdict.outcome is Outcome.TIMEOUT
    assert 0.3 <= verdict.cpu_s < 0.9
    assert verdict.detail == "CPU limit reached in the program itself"


def test_a_sleeper_meets_the_wall_limit_and_waits_no_longer() -> None:
    verdict = judged("import time\ntime.sleep(60)", limits=Limits(wall_s=1.0))
    assert verdict.outcome is Outcome.TIMEOUT
    assert 1.0 <= verdict.wall_s < 2.0
    assert verdict.cpu_s < 0.3


def burning(cpu_s: float) -> str:
    return (
        "import time\ndef f(x):\n    start = time.process_time()\n"
        f"    while time.process_time() - start < {cpu_s}: pass\n    return x + 1\n"
    )


def test_a_task_whose_reference_is_slow_gets_five_times_its_time() -> None:
    limits = Limits(cpu_s=0.4)
    assert judged(burning(0.7), task(), limits).outcome is Outcome.TIMEOUT
    assert judged(burning(0.7), task(reference=burning(0.25)), limits).outcome is Outcome.PASSED
    assert judged(SPIN, task(reference=burning(0.1)), limits).outcome is Outcome.TIMEOUT


def test_a_reference_that_fails_wins_no_time() -> None:
    wrong = burning(0.25).replace("x + 1", "x")
    assert judged(burning(0.7), task(reference=wrong), Limits(cpu_s=0.4)).outcome is Outcome.TIMEOUT


# What counts as passing a test


def test_a_test_that_calls_nothing_is_not_passed() -> None:
    verdict = judged(SUCCESSOR, task("assert True", "f", "assert f(1) == 2"))
    assert (verdict.outcome, verdict.tests_passed) == (Outcome.FAILED, 1)
    assert verdict.detail == "test 1 of 3: assert True: it completed no call of f"


def test_an_expected_exception_is_an_answer_and_leaving_is_none() -> None:
    swallowing = "try: f(1)\nexcept ValueError: pass"
    assert judged("def f(x): raise ValueError", task(swallowing)).outcome is Outcome.PASSED
    assert judged("def f(x): return 0", task(swallowing)).outcome is Outcome.PASSED
    anything = "try: f(1)\nexcept Exception: pass"
    assert judged("def f(x): raise SystemExit", task(anything)).outcome is Outcome.FAILED
    assert (
        judged("import os\ndef f(x): os._exit(0)", task("try: f(1)\nexcept BaseException: pass")).outcome
        is Outcome.CRASHED
    )


def test_calls_in_the_set_up_or_inside_the_program_do_not_count() -> None:
    program = SUCCESSOR + "def g(x): return f(x)\n"
    assert judged(program, task("assert g(1) == 2", setup="f(1)")).outcome is Outcome.FAILED


def test_a_program_cannot_supply_the_modules_of_the_test() -> None:
    program = "class math: isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return 0"
    assert judged(program, task("assert math.isclose(f(1), 2.5)")).outcome is Outcome.FAILED


def test_stop_iteration_does_not_end_the_loops_of_the_test() -> None:
    program = "def f(x):\n    if x: raise StopIteration\n    return 1"
    assert judged(program, task("assert all(map(lambda x: f(x) == x + 1, range(5)))")).outcome is Outcome.ERROR
    assert judged(program, task("for a, b in zip(map(f, range(5)), [1, 2, 3]): assert a == b")).outcome is Outcome.ERROR


def test_membership_is_decided_here_and_tells_the_program_nothing() -> None:
    program = "seen = []\nclass A:\n    def __contains__(self, x):\n        seen.append(x)\n        return True\n"
    program += "    def __iter__(self): return iter([3])\ndef f(x): return seen[-1] if x and seen else A()"
    verdict = judged(program, task("assert 7 in f(0)", "assert 3 in f(0)", "assert f(1) == 7"))
    assert verdict.tests_passed == 1


def test_threads_are_bounded_for_root_too() -> None:
    program = """
import _thread, time
_thread.stack_size(32768)
def f(x):
    started = 0
    try:
        for _ in range(6000):
            _thread.start_new_thread(time.sleep, (3,))
            started += 1
    except RuntimeError:
        return x + 1 if started < 5000 else started
    return started
"""
    verdict = judged(program, task(), Limits(memory_mib=4096))
    assert verdict.outcome is Outcome.PASSED, verdict.detail


def test_an_entry_point_may_be_named_like_a_builtin_but_must_be_defined() -> None:
    exercise = task("assert sum(10, 15) == 25", entry_point="sum")
    assert judged("def sum(a, b): return a + b", exercise).outcome is Outcome.PASSED
    assert judged("def total(a, b): return a + b", task("assert sum([1]) == 1", entry_point="sum")).tests_passed == 0


def test_an_entry_point_may_be_a_class() -> None:
    exercise = task("assert isinstance(Stack(3), Stack)", "assert Stack.name == 's'", entry_point="Stack")
    verdict = judged("class Stack:\n    name = 's'\n    def __init__(self, n): pass", exercise)
    assert verdict.tests_passed == 1  # reading an attribute is no call


def test_set_up_runs_after_the_solution_and_may_use_its_classes() -> None:
    exercise = task("assert f(root) == 5", setup="root = Node(5)")
    program = "class Node:\n    def __init__(self, v): self.v = v\ndef f(n): return n.v"
    assert judged(program, exercise).outcome is Outcome.PASSED


def test_the_helpers_of_the_data_set_are_its_own_in_the_tests() -> None:
    exercise = task("assert f(encode('ab')) == 'ab'", prelude="def encode(s): return s[::-1]")
    assert judged("def f(s): return encode(s)", exercise).outcome is Outcome.PASSED
    assert judged("def encode(s): return s\ndef f(s): return s", exercise).outcome is Outcome.FAILED


def test_tests_see_the_real_builtins() -> None:
    program = "import builtins\nlen = builtins.len = lambda x: 7\ndef f(x): return [x]"
    assert judged(program, task("assert len(f(1)) == 7")).outcome is Outcome.FAILED
    patched = "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\ndef f(x): return 0"
    assert judged(patched).outcome is Outcome.FAILED


def test_tests_may_name_well_known_modules_without_importing_them() -> None:
    exercise = task("assert f('a') == sys.getsizeof('a')", "assert math.isclose(f(''), f(''))")
    assert judged("import sys\ndef f(x): return sys.getsizeof(x)", exercise).outcome is Outcome.PASSED


def test_random_draws_and_hash_order_are_the_same_in_every_process() -> None:
    expected = Random(seed_for(0, "program", "t")).random()
    in_test = Random(seed_for(0, "test", "t", 1)).random()
    exercise = task(f"assert f() == {expected!r}", f"f()\nassert random.random() == {in_test!r}")
    assert judged("import random\ndef f(): return random.random()", exercise).outcome is Outcome.PASSED
    details = {judged("import random\nraise ValueError(hash('abc'), random.random())").detail for _ in range(3)}
    assert len(details) == 1


# The process


def test_the_process_starts_with_nothing() -> None:
    program = """
import os, sys
assert dict(os.environ) == {} and sys.argv == ["candidate"]
assert os.getcwd() == "/"
assert sys.flags.no_site and sys.flags.no_user_site and sys.flags.safe_path and sys.dont_write_bytecode
assert not any("site-packages" in folder or "greenloop" in folder for folder in sys.path), sys.path
def is_open(fd):
    try: os.fstat(fd)
    except OSError: return False
    return True
assert [fd for fd in range(1000) if is_open(fd)] == [0, 1, 2, 3]
assert len({os.fstat(fd).st_rdev for fd in range(3)}) == 1
def f(x): return x + 1
"""
    verdict = judged(program)
    assert verdict.outcome is Outcome.PASSED, verdict.detail


def test_the_process_is_refused_what_it_does_not_need() -> None:
    program = """
import os, resource, signal, socket, subprocess, sys, threading
def refused(action):
    try: action()
    except (OSError, ValueError, RuntimeError): return True
    return False
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
assert soft == hard == 512 << 20
assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
refusals = [
    refused(lambda: open("file", "w")), refused(lambda: open("/tmp/file", "w")), refused(lambda: os.listdir("/")),
    refused(lambda: os.mkdir("/tmp/folder")), refused(lambda: os.unlink("/tmp/file")),
    refused(lambda: os.symlink("/etc", "/tmp/link")), refused(lambda: os.chmod("/tmp", 0o777)),
    refused(os.fork), refused(lambda: os.posix_spawn("/bin/true", ["true"], {})),
    refused(lambda: subprocess.run(["/bin/true"])), refused(socket.socket),
    refused(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)),
    refused(lambda: os.kill(os.getpid(), 0)), refused(lambda: signal.pidfd_send_signal(3, 0)),
    refused(lambda: resource.setrlimit(resource.RLIMIT_AS, unlimited)), refused(lambda: os.nice(1)),
    refused(lambda: os.setsid()), refused(lambda: os.memfd_create("x")), refused(lambda: os.sched_setaffinity(0, {0})),
]
def f(x): return x + 1 if all(refusals) else refusals
"""
    verdict = judged(program)
    assert verdict.outcome is Outcome.PASSED, verdict.detail


FLOOD = "import os\nwhile True:\n    for fd in range(3, 60):\n        try: os.write(fd, {data!r} * 4096)\n"
FLOOD += "        except OSError: pass"


@pytest.mark.parametrize("data", [b"x", b"loaded ok\n", b"\xff\n", b'{"passed": true}\n'])
def test_a_flood_of_forged_answers_is_a_crash_and_ends_soon(data: bytes) -> None:
    start = time.monotonic()
    verdict = judged(FLOOD.format(data=data), limits=Limits())
    assert verdict.outcome is Outcome.CRASHED
    assert time.monotonic() - start < 6


def test_limits_under_which_nothing_runs_are_refused_at_the_start() -> None:
    with pytest.raises(SandboxError, match=r"the proof 'a right program' gave \w+ instead of passed"):
        SandboxVerifier(Limits(cpu_s=1e-6))


def test_a_process_that_cannot_start_is_our_fault_and_not_the_programs() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with SandboxVerifier(QUICK, workers=1) as verifier:
        for pid in children_of(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            verdict = verifier.submit(THREE, SUCCESSOR).result()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert verifier.submit(THREE, SUCCESSOR).result().outcome is Outcome.PASSED
    assert (verdict.outcome, verdict.ran) == (Outcome.HARNESS, False)
    assert "Too many open files" in verdict.detail


def test_a_judge_that_dies_is_replaced_and_the_program_judged_again() -> None:
    with SandboxVerifier(QUICK, workers=1) as verifier:
        for pid in children_of(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        assert verifier.submit(THREE, SUCCESSOR).result().outcome is Outcome.PASSED


def test_judges_that_died_idle_cost_an_honest_program_nothing() -> None:
    with SandboxVerifier(QUICK, workers=2) as verifier:
        both = [verifier.submit(THREE, burning(0.2)) for _ in range(2)]
        wait(both)
        for pid in children_of(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        assert verifier.submit(THREE, SUCCESSOR).result().outcome is Outcome.PASSED


def test_a_program_that_hangs_its_judge_loses() -> None:
    """Tests that spin in the judge on what the program returned: the judge's own clock, and then its replacement."""
    exercise = task("v = f(1)\nwhile v: pass", "assert f(1)")
    with SandboxVerifier(Limits(cpu_s=0.5, wall_s=0.5), workers=1) as verifier:
        assert verifier.submit(exercise, "def f(x): return 1").result().outcome is Outcome.TIMEOUT
        stubborn = task("v = f(1)\nwhile v:\n    try:\n        while v: pass\n    except BaseException: pass")
        assert verifier.submit(stubborn, "def f(x): return 1").result().outcome is Outcome.TIMEOUT
        assert verifier.submit(THREE, SUCCESSOR).result().outcome is Outcome.PASSED


def test_hundreds_of_failing_tests_with_long_messages_fit_into_the_answer() -> None:
    exercise = task(*[f"assert f({number})" for number in range(2000)])
    verdict = judged("def f(x): raise ValueError('\u2603' * 500)", exercise, Limits())
    assert (verdict.outcome, verdict.tests_total) == (Outcome.ERROR, 2000)


def test_impossible_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="cpu_s must be a positive number"):
        Limits(cpu_s=0)
    with pytest.raises(ValueError, match="wall_s must be a positive number"):
        Limits(wall_s=float("nan"))


# The verifier


def test_closing_kills_what_runs_and_gives_up_what_waits() -> None:
    verifier = SandboxVerifier(Limits(wall_s=60), workers=2)
    futures = [verifier.submit(THREE, "import time\ntime.sleep(60)") for _ in range(6)]
    assert eventually(lambda: len(children_of(os.getpid())) >= 2)
    start = time.monotonic()
    verifier.close()
    assert time.monotonic() - start < 2
    assert not wait(futures, timeout=0).not_done
    for future in futures:
        with pytest.raises(SandboxError, match="closed"):
            future.result()
    with pytest.raises(SandboxError, match="closed"):
        verifier.submit(THREE, SUCCESSOR)
    assert children_of(os.getpid()) == set()


TRAINER = """
import signal
# A shell starts what it puts in the background with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from greenloop.sandbox import Limits, SandboxVerifier
from greenloop.types import Task
task = Task(task_id="t", statement="", entry_point="f", tests=("f(1)",))
with SandboxVerifier(Limits(wall_s=60), workers=2) as verifier:
    futures = [verifier.submit(task, "import time; time.sleep(60)") for _ in range(2)]
    [future.result() for future in futures]
"""


def descendants(pid: int) -> set[int]:
    found = children_of(pid)
    return found.union(*(descendants(child) for child in found))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_no_program_survives_the_trainer(end: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", TRAINER], stderr=subprocess.DEVNULL) as trainer:
        # Two judges, two fork servers, two programs, two processes in waiting; before, each judge has its proofs.
        processes: set[int] = set()
        deadline = time.monotonic() + 20
        while not (len(processes) == 8 and processes == descendants(trainer.pid)) and time.monotonic() < deadline:
            processes = descendants(trainer.pid)
            time.sleep(0.3)
        assert len(processes) == 8
        trainer.send_signal(end)
        trainer.wait(timeout=5)
        assert eventually(lambda: not any(map(is_running, processes)), seconds=2)


def test_many_programs_leave_no_process_and_no_descriptor() -> None:
    programs = [SUCCESSOR, "import os; os._exit(3)", "def f(x): return 0", None]
    before = len(os.listdir("/proc/self/fd"))
    with SandboxVerifier(QUICK, workers=4) as verifier:
        futures = [verifier.submit(THREE, program) for program in programs * 10]
        outcomes = [future.result().outcome for future in futures]
    assert outcomes == [Outcome.PASSED, Outcome.CRASHED, Outcome.FAILED, Outcome.NO_CODE] * 10
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_without_locks_the_verdict_is_still_decided_elsewhere_and_the_level_says_so() -> None:
    with SandboxVerifier(QUICK, workers=1, unsandboxed=True) as verifier:
        assert verifier.level == "rlimits-only"
        assert "UNSANDBOXED" in verifier.notice
        reads = "def f(x): return x + 1 if open('/proc/self/status').read() else 0"
        assert verifier.submit(THREE, reads).result().outcome is Outcome.PASSED
        forged = "class T:\n    def __eq__(self, other): return True\ndef f(x): return T()"
        assert verifier.submit(THREE, forged).result().outcome is Outcome.FAILED


def test_the_level_of_this_machine_is_a_locked_one() -> None:
    with SandboxVerifier(QUICK, workers=1) as verifier:
        assert verifier.level in ("full", "no-open")
        assert verifier.notice == f"sandbox level '{verifier.level}': {NOTICES[verifier.level]}"


def test_without_landlock_no_file_can_be_opened_and_the_library_still_works() -> None:
    with SandboxVerifier(QUICK, workers=1, landlock=False) as verifier:
        assert verifier.level == "no-open"
        reads = "def f(x):\n    try: open('/usr/lib/os-release')\n    except PermissionError: return x + 1"
        for program in (reads, *HONEST.values()):
            verdict = verifier.submit(THREE, program).result()
            assert verdict.outcome is Outcome.PASSED, verdict.detail


def test_an_honest_program_is_not_timed_out_by_its_neighbours() -> None:
    """Four judges a core and a CPU limit of 2.5 times the need: a wall clock would kill most of them."""
    limits = Limits(cpu_s=0.5, wall_s=20)
    with SandboxVerifier(limits, workers=4 * (os.cpu_count() or 1)) as verifier:
        futures = [verifier.submit(task(), burning(0.2)) for _ in range(24)]
        assert {future.result().outcome for future in futures} == {Outcome.PASSED}


@pytest.mark.parametrize("landlock", [True, False])
def test_all_mbpp_references_pass(data_dir: Path, landlock: bool) -> None:
    tasks = load_tasks("mbpp", data_dir=data_dir).tasks
    with SandboxVerifier(landlock=landlock) as verifier:
        futures = [verifier.submit(exercise, exercise.reference) for exercise in tasks]
        verdicts = [future.result() for future in futures]
    failed = {
        exercise.task_id: verdict.detail
        for exercise, verdict in zip(tasks, verdicts, strict=True)
        if verdict.outcome is not Outcome.PASSED
    }
    assert len(tasks) == 974
    assert failed == {}


# The verdict, without a process


def seen(
    *results: BlockResult, ending: Ending = Ending.ANSWERED, load: LoadResult | None = LoadResult.OK
) -> Transcript:
    return Transcript(ending=ending, load=load, blocks=tuple((result, "") for result in results))


PASS, FAIL, ERROR, MEMORY = BlockResult.PASSED, BlockResult.FAILED, BlockResult.ERROR, BlockResult.MEMORY


@pytest.mark.parametrize(
    ("transcript", "outcome"),
    [
        (seen(PASS, PASS, PASS), Outcome.PASSED),
        (seen(PASS, FAIL, ERROR), Outcome.FAILED),
        (seen(PASS, ERROR, FAIL), Outcome.ERROR),
        (seen(FAIL, MEMORY, ERROR), Outcome.MEMORY),
        (seen(FAIL, PASS, ending=Ending.CPU), Outcome.TIMEOUT),
        (seen(MEMORY, ending=Ending.WALL), Outcome.TIMEOUT),
        (seen(PASS, PASS, PASS, ending=Ending.DIED), Outcome.CRASHED),
        (seen(PASS, PASS, PASS, ending=Ending.MALFORMED), Outcome.CRASHED),
        (seen(load=LoadResult.ERROR), Outcome.ERROR),
        (seen(load=LoadResult.MEMORY), Outcome.MEMORY),
        (seen(ending=Ending.NOT_STARTED, load=None), Outcome.HARNESS),
    ],
)
def test_the_outcome_is_the_gravest_thing_that_was_seen(transcript: Transcript, outcome: Outcome) -> None:
    assert outcome_of(transcript, 3) is outcome


def test_no_tests_are_never_passed() -> None:
    assert outcome_of(seen(), 0) is Outcome.HARNESS


def test_tests_after_the_cut_count_as_not_passed() -> None:
    verdict = verdict_of(seen(PASS, FAIL, PASS), THREE)
    assert (verdict.tests_passed, verdict.hidden_passed) == (2, 1)
    cut = verdict_of(seen(PASS, PASS, ending=Ending.CPU), THREE)
    assert (cut.tests_passed, cut.hidden_passed, cut.tests_total, cut.hidden_total) == (2, 0, 3, 1)
    assert cut.detail == "CPU limit reached in test 3 of 3 (hidden): assert f(-1) == 0"
