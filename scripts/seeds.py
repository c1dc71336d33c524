"""Train a recipe for several seeds and print the table of docs/results.md.

    python scripts/seeds.py --recipe starter --out runs/seeds 0 1 2

Each seed is one `greenloop train` from nothing; `--mbpp` adds `greenloop eval` of base and adapter on MBPP validation
(greedy; needs GREENLOOP_DATA_DIR or the hub). A run that is finished already is only read.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

GREENLOOP = [sys.executable, "-m", "greenloop"]


def run(*arguments: str) -> None:
    """One command, shown and checked."""
    print("$ greenloop", *arguments, flush=True)
    subprocess.run([*GREENLOOP, *arguments], check=True)


def main() -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", nargs="+", type=int)
    parser.add_argument("--recipe", default="starter")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--mbpp", action="store_true", help="also MBPP validation, base and adapters")
    options = parser.parse_args()
    for seed in options.seeds:
        folder = options.out / f"seed-{seed}"
        if not (folder / "results.json").is_file():
            run("train", options.recipe, "--set", f"seed={seed}", "--out", str(folder))
        if options.mbpp and not (folder / "mbpp" / "results.json").is_file():
            run("eval", str(folder), "--tasks", "mbpp:validation", "--max-new-tokens", "200", "--out", f"{folder}/mbpp")
    if options.mbpp and not (options.out / "base-mbpp" / "results.json").is_file():
        base = json.loads((options.out / f"seed-{options.seeds[0]}" / "environment.json").read_text())["model"]["spec"]
        run("eval", base, "--tasks", "mbpp:validation", "--max-new-tokens", "200", "--out", f"{options.out}/base-mbpp")
    print(json.dumps({seed: table_row(options.out / f"seed-{seed}") for seed in options.seeds}, indent=2))
    gains = [table_row(options.out / f"seed-{seed}")["gain"] for seed in options.seeds]
    print(f"median gain in sampled pass@1: {100 * statistics.median(gains):.1f} points over {len(gains)} seeds")


def table_row(folder: Path) -> dict[str, Any]:
    """The numbers of one run."""
    results = json.loads((folder / "results.json").read_text())
    steps = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    difference = results["difference"]["sampled"]["pass_at_1"]
    return {
        "gain": difference["difference"],
        "difference": results["difference"],
        "train_minutes": sum(step["seconds"]["total"] for step in steps) / 60,
        "completions": sum(sum(step["outcomes"].values()) for step in steps),
    }


if __name__ == "__main__":
    main()
