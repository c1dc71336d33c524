"""Ship what an evaluation found as the starter recipe's probe.

    greenloop eval smollm2-135m --tasks starter:train --no-greedy --samples 4 --temperature 0.8 \\
        --max-new-tokens 100 --out E
    python scripts/freeze_probe.py E

Needed again after each change of the train split or of the recipe's sampling; until then the recipe probes by itself.
"""

import json
import sys
from pathlib import Path
from typing import Any

import greenloop
from greenloop.files import write_atomically
from greenloop.known_probe import SAMPLING

SHIPPED = Path(greenloop.__file__).parent / "recipes" / "starter.probe.json"


def probe_of(results: dict[str, Any]) -> dict[str, Any]:
    """The file's content, from an evaluation's `results.json`."""
    settings = results["settings"]
    return {
        "asked": {
            "weights_sha256": results["model"]["weights_sha256"],
            "tasks_sha256": results["tasks"]["sha256"],
            **{name: settings[name] for name in ("protocol", "shown_tests", *SAMPLING)},
        },
        "samples": settings["samples"],
        "dtype": results["environment"]["dtype"],
        "counts": {
            task["task_id"]: [task["passed"], task["n"] - task["harness"] - task["passed"]]
            for task in results["sampled"]["tasks"]
        },
    }


if __name__ == "__main__":
    found = json.loads((Path(sys.argv[1]) / "results.json").read_text(encoding="utf-8"))
    probe = probe_of(found)
    write_atomically(SHIPPED, json.dumps(probe) + "\n")
    print(f"{SHIPPED}: {len(probe['counts'])} tasks")
