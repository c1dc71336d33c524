"""What a run folder says, read for its card.

In: the folder. Out: a `RunFacts`. Reads files only; knows nothing of Markdown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from greenloop.errors import RunError
from greenloop.models import PACKAGED
from greenloop.recipe import Recipe, load_recipe
from greenloop.results import Record, read_record

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_QUANTISED = re.compile(r"[.-]((?:IQ|Q|BF|F)\d\w*)\.gguf$", re.IGNORECASE)
_CONVERTED = re.compile(r"[0-9a-f]{64}-\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a run folder says."""

    folder: Path
    recipe: Recipe
    environment: Record
    results: Record
    """`before`, `after`, `difference`; empty if the run was not evaluated."""
    journal: tuple[Record, ...]
    """One object a step."""
    adapter: Record
    """PEFT's own config."""

    @property
    def model(self) -> Record:
        """What the environment says about the base model."""
        return dict(self.environment.get("model", {}))

    @property
    def base_id(self) -> str:
        """Hub id of the base, or of the model that a packaged file was quantised from; empty if unknown."""
        if self._packaged:
            return PACKAGED.hub_id
        candidates = (self.model.get("upstream"), self.model.get("base_name"))
        return next((name for name in candidates if name and HUB_ID.fullmatch(name) and not Path(name).exists()), "")

    @property
    def quantisation(self) -> str:
        """The GGUF type that the base was stored in, or `GGUF`; empty if it did not come from a GGUF file."""
        file_name = PACKAGED.file_name if self._packaged else str(self.model.get("spec", ""))
        if found := _QUANTISED.search(file_name):
            return found.group(1).upper()
        converted = _CONVERTED.fullmatch(Path(str(self.model.get("base_name", ""))).name)
        return "GGUF" if converted or file_name.endswith(".gguf") else ""

    @property
    def _packaged(self) -> bool:
        return self.model.get("weights_sha256") == PACKAGED.sha256 or self.model.get("spec") == PACKAGED.alias


def read_run(run_dir: Path) -> RunFacts:
    """What the folder says, read whole.

    Raises:
        RunError: a file is missing or damaged.
        ConfigError: the recipe cannot be read.
    """
    adapter = _read_object(run_dir / "adapter" / "adapter_config.json")
    environment = _read_object(run_dir / "environment.json")
    if not (run_dir / "recipe.toml").is_file():
        raise RunError(f"{run_dir / 'recipe.toml'} is missing: give the folder of a run")
    return RunFacts(
        folder=run_dir,
        recipe=load_recipe(str(run_dir / "recipe.toml")),
        environment=environment,
        results=read_record(run_dir) if (run_dir / "results.json").is_file() else {},
        journal=tuple(_read_journal(run_dir / "journal.jsonl")),
        adapter=adapter,
    )


def _read_object(path: Path) -> Record:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(
            f"{path} cannot be read ({error.strerror or error}): give the folder of a run that has saved its adapter"
        ) from error
    except ValueError as error:
        raise RunError(f"{path} is not a JSON file ({error}): resume the run to write it again") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} is not a JSON object: resume the run to write it again")
    return value


def _read_journal(path: Path) -> Iterator[Record]:
    """The steps up to the first line that is not whole: a killed run may leave half a line at the end."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
