"""A training step against TRL's, in the same run, in turn, on the same work.

    GREENLOOP_DATA_DIR=... python -m bench.versus_trl --size 4x4 --size 8x8 --beta 0.05 --mode equal --steps 3

Both sides are processes that are built once and take turns: while one does a step, the other waits. Prints a table and
writes it, with every number behind it, to `--out`. Needs the development requirements (TRL 1.16).
"""

from __future__ import annotations

import json
import statistics
from typing import Any

from bench.command import machine, parse, parser_of, save, work_of
from bench.side import SideProcess
from bench.work import Work

SIDES = ("greenloop", "trl")
STAGES = ("generation", "verification", "old", "reference", "update", "total")


def compare(work: Work, steps: int) -> dict[str, Any]:
    """Steps of both sides, after one to warm up."""
    sides = []
    try:
        for name in SIDES:
            sides.append(SideProcess(f"bench.side_{name}", work.to_json()))
            print(f"{name}: ready, {sides[-1].about}", flush=True)
        reports: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
        for number in range(steps + 1):
            for name, side in zip(SIDES, sides, strict=True):
                report = side.step()
                print(f"step {number} {name}: {report['seconds']['total']:.1f} s", flush=True)
                reports[name].append(report)
    finally:
        for side in sides:
            side.close()
    if work.equal:
        trained = {name: [report["trained_tokens"] for report in reports[name]] for name in SIDES}
        expected = work.completions * work.max_new_tokens
        assert all(count == expected for counts in trained.values() for count in counts), (expected, trained)
    measured = {name: reports[name][1:] for name in SIDES}
    about = {name: side.about for name, side in zip(SIDES, sides, strict=True)}
    return {"work": json.loads(work.to_json()), "sides": about, "steps": measured, "summary": summary(measured)}


def summary(measured: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Median, least and most seconds by side and stage; peak memory; tokens a second."""
    table: dict[str, Any] = {}
    for name, reports in measured.items():
        stages = {}
        for stage in STAGES:
            seconds = [report["seconds"].get(stage, 0.0) for report in reports]
            stages[stage] = {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
        rates = [report["tokens"] / report["seconds"]["generation"] for report in reports]
        peaks = {
            peak: max(report[peak] for report in reports)
            for peak in ("peak_mb", "device_peak_mb")
            if peak in reports[0]
        }
        table[name] = {"seconds": stages, "tokens_per_s": statistics.median(rates), **peaks}
    return table


def markdown(results: list[dict[str, Any]]) -> str:
    """The table for people."""
    lines = ["| work | stage | greenloop | TRL 1.16 | ratio |", "|---|---|---|---|---|"]
    for result in results:
        work, ours, theirs = result["work"], *(result["summary"][name] for name in SIDES)
        title = f"{work['prompts']} x {work['samples']}, {work['mode']}, beta {work['beta']:g}"
        for stage in STAGES:
            took, took_them = ours["seconds"][stage], theirs["seconds"][stage]
            if took_them["median"]:
                ratio = f"{took_them['median'] / took['median']:.1f}" if took["median"] > 1e-3 else "-"
                lines.append(f"| {title} | {stage} | {spread(took)} | {spread(took_them)} | {ratio} |")
        for peak, words in (("peak_mb", "peak memory"), ("device_peak_mb", "peak GPU memory")):
            if peak in ours:
                mine, other = ours[peak] / 1024, theirs[peak] / 1024
                lines.append(f"| {title} | {words} | {mine:.1f} GB | {other:.1f} GB | {other / mine:.1f} |")
        rates = ours["tokens_per_s"], theirs["tokens_per_s"]
        lines.append(f"| {title} | tokens/s | {rates[0]:.0f} | {rates[1]:.0f} | {rates[0] / rates[1]:.1f} |")
    return "\n".join(lines) + "\n"


def spread(seconds: dict[str, float]) -> str:
    """Median and range."""
    return f"{seconds['median']:.2f} s ({seconds['least']:.2f}-{seconds['most']:.2f})"


def main() -> None:
    """All comparisons that were asked for."""
    parser = parser_of(__doc__)
    parser.add_argument("--size", action="append", help="prompts x samples, e.g. 4x4; repeat for more")
    parser.add_argument("--beta", action="append", type=float, help="repeat for more")
    parser.add_argument("--mode", action="append", choices=("equal", "natural"), help="repeat for more")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each side, after one to warm up")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument(
        "--trl-rows", type=int, default=16, help="TRL's per_device_train_batch_size; less takes less memory"
    )
    options = parse(parser)
    results = []
    for size in options.size or ["4x4", "8x8"]:
        prompts, samples = map(int, size.split("x"))
        for mode in options.mode or ["equal"]:
            for beta in options.beta or [0.05]:
                work = work_of(
                    options,
                    prompts=prompts,
                    samples=samples,
                    max_new_tokens=options.max_new_tokens,
                    beta=beta,
                    mode=mode,
                    trl_rows=options.trl_rows,
                )
                results.append(compare(work, options.steps))
                record = {"machine": machine(), "results": results}
                save(options.out, "versus_trl", record, markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
