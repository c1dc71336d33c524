"""How a step's time and memory grow with K, with the prompts, with the new tokens and with the rows in flight.

    GREENLOOP_DATA_DIR=... python -m bench.growth

Equal work (no end of sequence, fixed rewards, beta 0.05). Each point is a process of its own, so that its peak memory
is its own; one step warms up, `--steps` are measured. Writes `growth.json`, `growth.md` and, where matplotlib is
installed (the extra `bench`), `growth.png` to `--out`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.side import SideProcess
from bench.versus_trl import machine
from bench.work import Work
from greenloop.places import cache_dir, data_dir

CURVES: dict[str, list[int]] = {
    "samples": [4, 8, 16, 32],
    "prompts": [4, 8, 16, 32, 64],
    "max_new_tokens": [64, 128, 256, 512, 1024],
    "rows": [8, 16, 32, 64, 128],
}
NAMES = {
    "samples": "K, with 4 prompts of 64 new tokens",
    "prompts": "prompts, with K = 4 and 64 new tokens",
    "max_new_tokens": "new tokens, with 2 prompts and K = 4",
    "rows": "rows in flight, with 16 prompts, K = 8 and 64 new tokens",
}
STAGES = ("generation", "reference", "update")


@dataclass(frozen=True, slots=True)
class Point:
    """One size."""

    curve: str
    size: int
    tokens: int
    """Completion tokens of a step."""
    seconds: dict[str, float]
    """Median by stage."""
    peak_mb: float
    """Of the process, on the host."""
    loaded_mb: float
    """The same before the first step: a peak no higher than this is the loading of the model."""


def work_of(curve: str, size: int, common: Work) -> Work:
    """The work of one point."""
    if curve == "max_new_tokens":
        return replace(common, prompts=2, max_new_tokens=size)
    if curve == "rows":
        return replace(common, prompts=16, samples=8, rows=size)
    return Work(**{**asdict(common), curve: size})


def point(curve: str, size: int, common: Work, steps: int) -> Point:
    """Measured in a process of its own."""
    side = SideProcess("bench.side_greenloop", work_of(curve, size, common).to_json())
    try:
        reports = [side.step() for _ in range(steps + 1)][1:]
    finally:
        side.close()
    seconds = {
        stage: statistics.median(report["seconds"].get(stage, 0.0) for report in reports)
        for stage in (*STAGES, "total")
    }
    peak_mb = max(report["peak_mb"] for report in reports)
    return Point(curve, size, reports[0]["tokens"], seconds, peak_mb, side.about["peak_mb"])


def by_curve(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of each curve that was measured."""
    found = {curve: [one for one in points if one.curve == curve] for curve in CURVES}
    return {curve: chosen for curve, chosen in found.items() if chosen}


def markdown(points: Sequence[Point]) -> str:
    """One table a curve."""
    lines = []
    for curve, chosen in by_curve(points).items():
        lines += [
            f"Over {NAMES[curve]}:",
            "",
            "| | generation | reference | update | step | ms a token | peak memory |",
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        for one in chosen:
            times = " | ".join(f"{one.seconds[stage]:.1f} s" for stage in (*STAGES, "total"))
            each = 1e3 * one.seconds["total"] / one.tokens
            lines.append(f"| {one.size} | {times} | {each:.1f} | {one.peak_mb / 1024:.2f} GB |")
        lines.append("")
    return "\n".join(lines)


def plot(points: Sequence[Point], path: Path) -> None:
    """Time a token and peak memory over each size."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is missing (pip install '.[bench]')")
        return
    curves = by_curve(points)
    figure, axes = pyplot.subplots(2, len(curves), figsize=(4 * len(curves), 6), squeeze=False)
    for column, (curve, chosen) in enumerate(curves.items()):
        sizes = [one.size for one in chosen]
        for stage in STAGES:
            axes[0][column].plot(sizes, [1e3 * one.seconds[stage] / one.tokens for one in chosen], "o-", label=stage)
        axes[1][column].plot(sizes, [one.peak_mb / 1024 for one in chosen], "o-", color="black")
        what, _, fixed = NAMES[curve].partition(", ")
        for row, label in enumerate(("ms a completion token", "peak memory, GB")):
            axes[row][column].set(xscale="log", xlabel=what, ylabel=label, ylim=(0, None))
            axes[row][column].set_xticks(sizes, [str(size) for size in sizes])
            axes[row][column].minorticks_off()
        axes[0][column].set_title(fixed, fontsize=10)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curve", action="append", choices=CURVES, help="repeat for more; default all")
    parser.add_argument("--most", type=int, default=0, help="leave out sizes above this")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", default="mbpp:train")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    common = Work(
        prompts=4,
        samples=4,
        max_new_tokens=64,
        model=options.model,
        tasks=options.tasks,
        dtype=options.dtype,
        device=options.device,
        cache_dir=str(cache_dir()),
        data_dir=str(data_dir() or ""),
    )
    options.out.mkdir(parents=True, exist_ok=True)
    points: list[Point] = []
    for curve in options.curve or CURVES:
        for size in CURVES[curve]:
            if not options.most or size <= options.most:
                points.append(point(curve, size, common, options.steps))
                print(f"{curve} {size}: {points[-1].seconds['total']:.1f} s a step", flush=True)
                record: dict[str, Any] = {"machine": machine(), "points": [asdict(one) for one in points]}
                (options.out / "growth.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "growth.md").write_text(markdown(points))
    plot(points, options.out / "growth.png")
    print(markdown(points))


if __name__ == "__main__":
    main()
