"""How a step's time and memory grow with K, with the prompts, with the new tokens and with the rows in flight.

    GREENLOOP_DATA_DIR=... python -m bench.growth

Equal work (no end of sequence, fixed rewards, beta 0.05). Each point is a process of its own, so that its peak memory
is its own; one step warms up, `--steps` are measured. Writes `growth.json`, `growth.md` and, where matplotlib is
installed (the extra `bench`), `growth.png` to `--out`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.command import machine, parse, parser_of, save, work_of
from bench.side import SideProcess
from bench.work import Work

STAGES = ("generation", "reference", "update")


@dataclass(frozen=True, slots=True)
class Curve:
    """One size grows, the others stay."""

    what: str
    sizes: Sequence[int]
    fixed: Mapping[str, int]
    """Sizes of the work."""

    @property
    def beside(self) -> str:
        """The fixed sizes for people."""
        return ", ".join(f"{name} = {size}" for name, size in self.fixed.items())


CURVES = {
    "samples": Curve("K", [4, 8, 16, 32], {"prompts": 4, "max_new_tokens": 64}),
    "prompts": Curve("prompts", [4, 8, 16, 32, 64], {"samples": 4, "max_new_tokens": 64}),
    "max_new_tokens": Curve("new tokens", [64, 128, 256, 512, 1024], {"prompts": 2, "samples": 4}),
    "rows": Curve("rows in flight", [8, 16, 32, 64, 128], {"prompts": 16, "samples": 8, "max_new_tokens": 64}),
}


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


def point(curve: str, size: int, work: Work, steps: int) -> Point:
    """Measured in a process of its own."""
    side = SideProcess("bench.side_greenloop", work.to_json())
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
            f"Over {CURVES[curve].what}, with {CURVES[curve].beside}:",
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
        for row, label in enumerate(("ms a completion token", "peak memory, GB")):
            axes[row][column].set(xscale="log", xlabel=CURVES[curve].what, ylabel=label, ylim=(0, None))
            axes[row][column].set_xticks(sizes, [str(size) for size in sizes])
            axes[row][column].minorticks_off()
        axes[0][column].set_title(CURVES[curve].beside, fontsize=10)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Measure and write."""
    parser = parser_of(__doc__)
    parser.add_argument("--curve", action="append", choices=CURVES, help="repeat for more; default all")
    parser.add_argument("--most", type=int, default=0, help="leave out sizes above this")
    parser.add_argument("--steps", type=int, default=2)
    options = parse(parser)
    points: list[Point] = []
    for name in options.curve or CURVES:
        curve = CURVES[name]
        for size in curve.sizes:
            if not options.most or size <= options.most:
                work = work_of(options, **curve.fixed, **{name: size})
                points.append(point(name, size, work, options.steps))
                print(f"{name} {size}: {points[-1].seconds['total']:.1f} s a step", flush=True)
                record = {"machine": machine(), "points": [asdict(one) for one in points]}
                save(options.out, "growth", record, markdown(points))
    plot(points, options.out / "growth.png")
    print(markdown(points))


if __name__ == "__main__":
    main()
