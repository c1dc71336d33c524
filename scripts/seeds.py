"""Train a recipe for several seeds and print the tables of docs/results.md.

    python scripts/seeds.py --recipe starter --out runs/seeds 0 1 2

Each seed is one `greenloop train` from nothing; `--mbpp` adds `greenloop eval` of base and adapter on MBPP validation
(greedy; needs GREENLOOP_DATA_DIR or the hub). A run that is finished already is only read. `--set` goes to every run.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from greenloop.compare import ModeComparison, compare_records, points
from greenloop.results import estimate_of, percent, read_record
from greenloop.run_folder import read_journal
from greenloop.summary import Mode

GREENLOOP = [sys.executable, "-m", "greenloop"]
MEASURES = {"passed": "pass@1", "ran": "programs that run", "passed_of_ran": "passes among those"}


def run(*arguments: str) -> None:
    """One command, shown and checked."""
    print("$ greenloop", *arguments, flush=True)
    subprocess.run([*GREENLOOP, *arguments], check=True)


def main() -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="+", type=int)
    parser.add_argument("--recipe", default="starter")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--mbpp", action="store_true", help="also MBPP validation, base and adapters")
    parser.add_argument("--set", action="append", default=[], help="a recipe key, as for `greenloop train`")
    options = parser.parse_args()
    folders = {seed: options.out / f"seed-{seed}" for seed in options.seeds}
    settings = [part for one in options.set for part in ("--set", one)]
    for seed, folder in folders.items():
        if not (folder / "results.json").is_file():
            run("train", options.recipe, *settings, "--set", f"seed={seed}", "--out", str(folder))
    print(held_out_table(folders))
    if options.mbpp:
        print(mbpp_table(folders, options.out / "base-mbpp"))


def held_out_table(folders: dict[int, Path]) -> str:
    """Before and after on the recipe's held-out tasks, Markdown, and the median gain."""
    results = {seed: read_record(folder) for seed, folder in folders.items()}
    paired = {seed: by_mode(one["before"], one["after"]) for seed, one in results.items()}
    modes = [mode for mode in (Mode.SAMPLED, Mode.GREEDY) if all(mode in modes for modes in paired.values())]
    lines = ["| | seed | before | after | paired difference |", "|---|---|---|---|---|"]
    for mode in modes:
        for measure, name in MEASURES.items():
            for seed, result in results.items():
                before, after = (shown(result[when][mode.value], measure) for when in ("before", "after"))
                one = paired[seed][mode]
                difference = {"passed": one.passed, "passed_of_ran": one.among_ran}.get(measure)
                change = points(difference) if difference else "-"
                lines.append(f"| {name}, {mode.value} | {seed} | {before} | {after} | {change} |")
    gains = [one[modes[0]].passed.difference for one in paired.values()]
    median = 100 * statistics.median(gains)
    lines += ["", f"Median gain in {modes[0].value} pass@1 over {len(gains)} seeds: {median:+.1f} points.", ""]
    for seed, folder in folders.items():
        steps = read_journal(folder / "journal.jsonl")
        minutes = sum(step["seconds"]["total"] for step in steps) / 60
        before, after = (results[seed][when][modes[0].value]["mean_tokens"] for when in ("before", "after"))
        lines.append(
            f"Seed {seed}: {len(steps)} steps in {minutes:.1f} minutes, {before:.0f} to {after:.0f} tokens each."
        )
    return "\n".join(lines) + "\n"


def mbpp_table(folders: dict[int, Path], base: Path) -> str:
    """Base and adapters on MBPP validation, greedy, Markdown; evaluates what is missing."""
    model = json.loads((next(iter(folders.values())) / "environment.json").read_text(encoding="utf-8"))["model"]["spec"]
    places = {"base": (model, base), **{f"seed {seed}": (str(one), one / "mbpp") for seed, one in folders.items()}}
    for spec, place in places.values():
        if not (place / "results.json").is_file():
            run("eval", spec, "--tasks", "mbpp:validation", "--max-new-tokens", "200", "--out", str(place))
    records = {name: read_record(place) for name, (_, place) in places.items()}
    lines = ["| | " + " | ".join(records) + " |", "|---" * (len(records) + 1) + "|"]
    for measure in ("passed", "ran"):
        lines.append(
            f"| {MEASURES[measure]} | " + " | ".join(shown(r["greedy"], measure) for r in records.values()) + " |"
        )
    base_record, *adapters = records.values()
    paired = [by_mode(base_record, one)[Mode.GREEDY].passed for one in adapters]
    lines.append("| paired difference in pass@1 | - | " + " | ".join(map(points, paired)) + " |")
    return "\n".join(lines) + "\n"


def by_mode(before: dict[str, Any], after: dict[str, Any]) -> dict[Mode, ModeComparison]:
    """Their comparison in each mode that both have."""
    return {one.mode: one for one in compare_records(before, after).modes}


def shown(summary: dict[str, Any], measure: str) -> str:
    """One rate with its interval."""
    rate = summary["pass_at_k"]["1"] if measure == "passed" else summary[measure]
    return "-" if rate is None else percent(estimate_of(rate))


if __name__ == "__main__":
    main()
