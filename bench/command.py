"""What the measuring commands share: their options, the work that these mean, the machine, the files they leave."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.work import Work
from greenloop import tuning
from greenloop.errors import UsageError
from greenloop.models import resolve
from greenloop.models.check import check
from greenloop.places import cache_dir, data_dir
from greenloop.tasks import load_tasks


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """With the options that every command has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", default="mbpp:train")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--matmul-precision", choices=("highest", "high"), default="highest")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; one sentence and status 2 if its model or tasks cannot be had, before any side starts."""
    options = parser.parse_args()
    try:
        load_tasks(options.tasks, data_dir=data_dir())
        check(resolve(options.model, cache_dir=cache_dir()))
    except UsageError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(2)
    return options


def work_of(options: argparse.Namespace, **sizes: Any) -> Work:
    """The options' model and tasks at these sizes, with the places of this machine."""
    chosen = {name: getattr(options, name) for name in ("model", "tasks", "dtype", "matmul_precision", "device")}
    return Work(**chosen, **sizes, cache_dir=str(cache_dir()), data_dir=str(data_dir() or ""))


def machine() -> dict[str, Any]:
    """Where this was measured."""
    about: dict[str, Any] = {"cpu": tuning.cpu_name(), "cores": tuning.cores(), "platform": platform.platform()}
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    for name in ("torch", "transformers", "peft", "trl", "llama-cpp-python"):
        try:
            about[name] = version(name)
        except PackageNotFoundError:
            about[name] = None
    return about


def save(out: Path, name: str, record: dict[str, Any], table: str) -> None:
    """Every number as `name.json`, the table for people as `name.md`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / f"{name}.md").write_text(table)
