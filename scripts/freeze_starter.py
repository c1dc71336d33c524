"""Print the content hash of the starter set and of each of its splits, or write them beside the set.

usage: python scripts/freeze_starter.py [--write]

Writing freezes the set: a test compares the loaded tasks with the file from then on.
"""

import argparse
import os
from pathlib import Path

import greenloop.tasks
from greenloop.tasks import load_tasks

FROZEN = Path(greenloop.tasks.__file__).parent / "starter" / "SHA256"


def frozen_lines() -> str:
    """One line a spec: `<hash> starter:<split>`, and the whole set first."""
    splits = sorted({task.split for task in load_tasks("starter").tasks})
    specs = ("starter", *(f"starter:{split}" for split in splits))
    return "".join(f"{load_tasks(spec).sha256} {spec}\n" for spec in specs)


def main() -> None:
    """Print the lines; with `--write` also put them in place, whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {FROZEN.name} beside the set")
    lines = frozen_lines()
    if parser.parse_args().write:
        partial = FROZEN.with_suffix(".partial")
        partial.write_text(lines, encoding="utf-8")
        os.replace(partial, FROZEN)
    print(lines, end="")


if __name__ == "__main__":
    main()
