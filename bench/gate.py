"""The regression gate: this working tree against the version in `bench/BASELINE`, in turn, on this machine.

    python -m bench.gate

Fails (exit status 1) if a stage takes more than `LIMIT` times as long as the baseline's in the median of the rounds,
twice. Only ratios within one run are compared, so that it works on any machine, however fast or busy. A change that is
slower for a reason, or that the old version's side cannot run, moves `bench/BASELINE` in the same commit and says why.
Without the baseline in the repository's history (a shallow clone) it says so and passes.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.side import ROOT, SideProcess
from greenloop.places import cache_dir

LIMIT = 1.2
ROUNDS = 9


def side_of(source: Path, **environment: str) -> SideProcess:
    """The process that runs one version."""
    paths = os.pathsep.join((str(source), str(ROOT)))
    side = SideProcess("bench.side_gate", PYTHONPATH=paths, **environment)
    assert Path(side.about["source"]) == source, f"{source} was asked for, {side.about['source']} was imported"
    return side


def baseline_source() -> Path | None:
    """The baseline's `src`, kept so that its native code is compiled once; None if the history lacks it."""
    commit = (ROOT / "bench" / "BASELINE").read_text(encoding="utf-8").split()[0]
    kept = cache_dir() / "gate" / commit / "src"
    if kept.is_dir():
        return kept
    archive = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        print(f"gate skipped: the history lacks {commit} (a shallow clone?): {archive.stderr.decode().strip()}")
        return None
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
        # Whole or not at all.
        (Path(folder) / "src").rename(kept)
    return kept


def ratios(old: Path, **environment: str) -> dict[str, float]:
    """Median over the rounds of new / old, by stage; one round warms up. The environment is the new side's."""
    with ThreadPoolExecutor() as pool:
        starting = [pool.submit(side_of, old), pool.submit(side_of, ROOT / "src", **environment)]
    sides = [side.result() for side in starting]
    try:
        orders = [sides if number % 2 else sides[::-1] for number in range(ROUNDS + 1)]
        rounds = [[side.step()["seconds"] for side in order] for order in orders]
    finally:
        for side in sides:
            side.close()
    pairs = [pair if number % 2 else pair[::-1] for number, pair in enumerate(rounds)][1:]
    return {stage: statistics.median(new[stage] / old[stage] for old, new in pairs) for stage in pairs[0][0]}


def slow_stages(old: Path, **environment: str) -> set[str]:
    """Measure once, print, and name the stages beyond the limit."""
    found = ratios(old, **environment)
    for stage, ratio in found.items():
        print(f"{stage:<8} {ratio:.2f} times the baseline's time{'  too slow' if ratio > LIMIT else ''}", flush=True)
    return {stage for stage, ratio in found.items() if ratio > LIMIT}


def main() -> int:
    """Exit status 1 if a stage got slower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planted", action="store_true", help="slow this version down by 30 %%, to see the gate fail")
    environment = {"GREENLOOP_GATE_SLOWDOWN": "1.3"} if parser.parse_args().planted else {}
    old = baseline_source()
    if old is None:
        return 0
    slow = slow_stages(old, **environment)
    if slow:
        print("once more: one measurement may have been disturbed")
        slow &= slow_stages(old, **environment)
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
