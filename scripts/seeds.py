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

from greenloop.compare import compare_records, comparison_record
from greenloop.results import estimate_of, percent, read_record
from greenloop.run_folder import read_journal

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
    lines = ["| | seed | before | after | paired difference |", "|---|---|---|---|---|"]
    gains = []
    results = {seed: read_record(folder) for seed, folder in folders.items()}
    modes = [mode for mode in ("sampled", "greedy") if next(iter(results.values()))["before"][mode]]
    for mode in modes:
        for measure, name in MEASURES.items():
            for seed, result in results.items():
                before, after = (shown(result[when][mode], measure) for when in ("before", "after"))
                difference = result["difference"][mode]
                paired = {"passed": difference["pass_at_1"], "passed_of_ran": difference["among_ran"]}.get(measure)
                lines.append(f"| {name}, {mode} | {seed} | {before} | {after} | {points(paired)} |")
                if (mode, measure) == ("sampled", "passed"):
                    gains.append(difference["pass_at_1"]["difference"])
    lines += [
        "",
        f"Median gain in sampled pass@1 over {len(gains)} seeds: {100 * statistics.median(gains):+.1f} points.",
        "",
    ]
    for seed, folder in folders.items():
        steps = read_journal(folder / "journal.jsonl")
        minutes = sum(step["seconds"]["total"] for step in steps) / 60
        before, after = (results[seed][when][modes[0]]["mean_tokens"] for when in ("before", "after"))
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
    paired = [comparison_record(compare_records(base_record, one))["greedy"]["pass_at_1"] for one in adapters]
    lines.append("| paired difference in pass@1 | - | " + " | ".join(points(one) for one in paired) + " |")
    return "\n".join(lines) + "\n"


def shown(summary: dict[str, Any], measure: str) -> str:
    """One rate with its interval."""
    rate = summary["pass_at_k"]["1"] if measure == "passed" else summary[measure]
    return "-" if rate is None else percent(estimate_of(rate))


def points(difference: dict[str, Any] | None) -> str:
    """A paired difference with its interval and p-value."""
    if difference is None:
        return "-"
    value, low, high = (100 * difference[key] for key in ("difference", "low", "high"))
    return f"{value:+.1f} points [{low:+.1f}, {high:+.1f}], p = {difference['p_value']:.2g}"


if __name__ == "__main__":
    main()
