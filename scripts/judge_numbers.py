"""The judge's numbers, as docs/sandbox.md quotes them: references, latency, throughput, and a soak.

    GREENLOOP_DATA_DIR=... python scripts/judge_numbers.py [--soak 20000]

Measure alone: another job on the same cores changes every number.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

from greenloop.places import data_dir
from greenloop.sandbox import Limits, SandboxVerifier
from greenloop.sandbox.pool import PROGRAMS_A_WORKER
from greenloop.tasks import load_tasks
from greenloop.types import Outcome, Task

TASK = Task(
    task_id="t",
    statement="",
    entry_point="f",
    tests=("assert f(1) == 2", "assert f(41) == 42", "assert f(-1) == 0"),
)
HONEST = "def f(x):\n    return x + 1\n"
BARE = HONEST + "\n".join(TASK.tests)
MIXED = {
    "honest": (HONEST, {Outcome.PASSED}),
    "wrong": ("def f(x):\n    return x\n", {Outcome.FAILED}),
    "raising": ("def f(x):\n    raise ValueError(x)\n", {Outcome.ERROR}),
    "syntax": ("def f(x) return x\n", {Outcome.ERROR}),
    "exit": ("import os\ndef f(x):\n    os._exit(0)\n", {Outcome.CRASHED}),
    "segfault": ("import ctypes\ndef f(x):\n    ctypes.string_at(0)\n", {Outcome.CRASHED}),
    "liar": (
        "class T:\n    def __eq__(self, o): return True\ndef f(x):\n    return T()\n",
        {Outcome.FAILED},
    ),
    "fork": ("import os\ndef f(x):\n    os.fork()\n    return x + 1\n", {Outcome.ERROR}),
    "big": ("def f(x):\n    return 'A' * (20 << 20)\n", {Outcome.ERROR}),
    "forged": (
        "import os\ndef f(x):\n    os.write(3, b'[\"t\",1]' * 99)\n    return 2\n",
        {Outcome.CRASHED},
    ),
    "threads": (
        "from threading import Thread\ndef f(x):\n    t = Thread(target=print)\n    t.start()\n    t.join()\n"
        "    return x + 1\n",
        {Outcome.PASSED},
    ),
    "memory": ("def f(x):\n    return len(bytearray(1 << 30))\n", {Outcome.MEMORY}),
}
LOOP = ("def f(x):\n    while True: pass\n", {Outcome.TIMEOUT})


def references() -> None:
    """Every reference of MBPP and HumanEval, one worker."""
    if not data_dir():
        print("references: skipped, GREENLOOP_DATA_DIR is not set")
        return
    for name in ("mbpp", "humaneval"):
        tasks = load_tasks(name, data_dir=data_dir()).tasks
        with SandboxVerifier(workers=1) as verifier:
            started = time.perf_counter()
            verdicts = [verifier.submit(task, task.reference) for task in tasks]
            failed = [t.task_id for t, v in zip(tasks, verdicts, strict=True) if v.result().outcome != Outcome.PASSED]
            seconds = time.perf_counter() - started
        print(
            f"{name}: {len(tasks) - len(failed)} of {len(tasks)} references pass, {seconds:.1f} s, one worker {failed}"
        )


def latency(count: int = 1000) -> None:
    """One after another, and beside a bare interpreter, in turn."""
    ours, bare = [], []
    with SandboxVerifier(workers=1) as verifier:
        print(verifier.notice)
        for number in range(count):
            started = time.perf_counter()
            assert verifier.submit(TASK, HONEST).result().outcome is Outcome.PASSED
            ours.append(time.perf_counter() - started)
            if number % 5 == 0:
                started = time.perf_counter()
                subprocess.run([sys.executable, "-I", "-S", "-c", BARE], check=True)
                bare.append(time.perf_counter() - started)
    ours.sort()
    middle, plain = statistics.median(ours), statistics.median(bare)
    print(
        f"sequential: p50 {1e3 * middle:.2f} ms, p99 {1e3 * ours[int(0.99 * count)]:.2f} ms over {count} programs; "
        f"bare python -I -S -c {1e3 * plain:.2f} ms ({len(bare)} runs); ratio {middle / plain:.2f}"
    )


def throughput(count: int = 2000, repeats: int = 3) -> None:
    """Programs a second with two workers."""
    rates = []
    with SandboxVerifier(workers=2) as verifier:
        for _ in range(repeats):
            started = time.perf_counter()
            futures = [verifier.submit(TASK, HONEST) for _ in range(count)]
            assert all(future.result().outcome is Outcome.PASSED for future in futures)
            rates.append(count / (time.perf_counter() - started))
    print(f"two workers: {statistics.median(rates):.0f} programs/s (of {', '.join(f'{r:.0f}' for r in rates)})")


def soak(count: int) -> None:
    """Many programs of all kinds: verdicts, memory, descriptors, processes."""
    draws = random.Random(0)
    names = list(MIXED)
    with SandboxVerifier(Limits(cpu_s=0.5, wall_s=5.0), workers=2) as verifier:
        for future in [verifier.submit(TASK, MIXED[name][0]) for name in names * 20]:
            future.result()
        first, last, descriptors = {}, {}, len(os.listdir("/proc/self/fd"))
        wrong, judged, started = [], 0, time.perf_counter()
        for begin in range(0, count, 1000):
            chosen = [draws.choice(names) for _ in range(min(1000, count - begin))]
            programs = [*(MIXED[name] for name in chosen), LOOP]
            futures = [verifier.submit(TASK, program) for program, _ in programs]
            for name, (_, expected), future in zip([*chosen, "loop"], programs, futures, strict=True):
                judged += 1
                if (outcome := future.result().outcome) not in expected:
                    wrong.append((name, outcome.value))
            last |= resident()
            first = {**last, **first}
        seconds = time.perf_counter() - started
        print(f"soak: {judged} programs in {seconds:.0f} s, {len(wrong)} unexpected verdicts {wrong[:5]}")
        growth = {pid: last[pid] - first[pid] for pid in first}
        print(f"  no process grew by more than {max(growth.values())} KiB, to {max(last.values())} KiB at most")
        print(f"  (a judge is replaced after {PROGRAMS_A_WORKER} programs)")
        print(f"  descriptors {len(os.listdir('/proc/self/fd')) - descriptors:+}, zombies {zombies()}")


def tree() -> set[int]:
    """This process and its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    found, more = set(), {os.getpid()}
    while more:
        found |= more
        more = {pid for pid, parent in parents.items() if parent in more} - found
    return found


def resident() -> dict[int, int]:
    """KiB of each process of the tree."""
    return {pid: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4 for pid in tree()}


def zombies() -> int:
    """Ended processes of the tree that nobody reaped."""
    return sum(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z" for pid in tree())


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="also judge N programs of all kinds")
    options = parser.parse_args()
    references()
    latency()
    throughput()
    if options.soak:
        soak(options.soak)


if __name__ == "__main__":
    main()
