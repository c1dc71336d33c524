"""Make an adapter from a run's checkpoints: shrunk towards the base, averaged, or older.

    greenloop train starter --set seed=20 --set checkpoint.every=12 --set checkpoint.keep=9 --out runs/dev
    python scripts/variants.py runs/dev '72*0.7' --out runs/dev-shrunk
    greenloop eval runs/dev-shrunk --tasks scripts/development.jsonl --samples 8 --max-new-tokens 100 --out runs/shrunk

A variant is a step, or the mean of all checkpoints from one step to another (48-72), and a factor of LoRA's B. For
choosing a recipe: never evaluate it on the split that the result is shown on. `greenloop compare` tells two apart.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from greenloop.run_folder import RunFolder, complete_checkpoints

VARIANT = re.compile(r"(?:(?P<first>\d+)-)?(?P<last>\d+)(?:\*(?P<factor>[\d.]+))?")


def weights(folder: RunFolder, variant: str) -> dict[str, Tensor]:
    """The variant's weights, by their names in PEFT's files.

    Raises:
        SystemExit: it is not a variant, or the run has no such step.
    """
    found = VARIANT.fullmatch(variant)
    if found is None:
        sys.exit(f"{variant}: not a variant; write 72, 72*0.7, 48-72 or 48-72*0.7")
    last, factor = int(found["last"]), float(found["factor"] or 1)
    paths = {int(path.name.removeprefix("step-")): path for path in complete_checkpoints(folder.checkpoints)}
    steps = [step for step in paths if int(found["first"] or last) <= step <= last]
    if last not in steps:
        sys.exit(f"{variant}: {folder.checkpoints} has no step {last}, but {list(paths)}")
    states = [load_file(paths[step] / "adapter.safetensors") for step in steps]
    return {
        name: sum(state[name] for state in states) / len(states) * (factor if "lora_B" in name else 1.0)
        for name in states[0]
    }


def main() -> None:
    """Write the adapter folder, without a card: the run's own tells of another adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("variant", help="72, 72*0.7, 48-72 or 48-72*0.7")
    parser.add_argument("--out", type=Path, required=True, help="a new adapter folder")
    options = parser.parse_args()
    folder = RunFolder(options.run)
    made = weights(folder, options.variant)
    shutil.copytree(folder.adapter, options.out, ignore=shutil.ignore_patterns("README.md"))
    save_file(made, options.out / "adapter_model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
