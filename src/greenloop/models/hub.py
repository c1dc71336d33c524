"""Models on the Hugging Face hub: which revision is meant, and where its small files lie.

In: a hub id. Out: the pinned commit and the snapshot folder with the files fetched so far. What the hub's cache holds
is used without asking the network, so a run does not change because somebody pushed; `load` fetches the weights.
"""

from dataclasses import dataclass
from pathlib import Path

from greenloop.errors import ModelError

CONFIG = "config.json"
CARD = "README.md"
TIMEOUT_S = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A model on the hub at one commit."""

    folder: Path
    """Holds `config.json`, and the card where there is one."""
    revision: str
    """Commit hash."""


def find_snapshot(hub_id: str) -> Snapshot:
    """The cached snapshot of the model's main branch, else a new one with config and card.

    Raises:
        ModelError: no such model, no access, not a transformers model, or neither cached nor reachable.
    """
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(hub_id, CONFIG)
    if not isinstance(cached, str):
        cached = _fetch(hub_id)
    folder = Path(cached).parent
    return Snapshot(folder=folder, revision=folder.name)


def _fetch(hub_id: str) -> str:
    from huggingface_hub import HfApi, errors, hf_hub_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's, by release

    try:
        # One request without retries says at once whether there is a network.
        facts = HfApi().model_info(hub_id, timeout=TIMEOUT_S)
        present = {sibling.rfilename for sibling in facts.siblings or ()}
        if CONFIG not in present:
            raise ModelError(_explain_missing_config(hub_id, present))
        if CARD in present:
            hf_hub_download(hub_id, CARD, revision="main")
        return hf_hub_download(hub_id, CONFIG, revision="main")
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{hub_id}: this model asks for an agreement; accept it on its hub page and run `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{hub_id}: neither a path here nor a public model on the hub; correct it, or run `hf auth login`."
        ) from error
    except (HTTPError, OSError) as error:
        raise ModelError(
            f"{hub_id}: neither a path here nor in the hub's cache, and the hub cannot be reached "
            f"({type(error).__name__}); check the network, or give a folder, a .gguf file or smollm2-135m."
        ) from error


def _explain_missing_config(hub_id: str, present: set[str]) -> str:
    if "adapter_config.json" in present:
        return f"{hub_id}: this is an adapter; run `hf download {hub_id} --local-dir FOLDER` and give FOLDER."
    return f"{hub_id}: the hub has no {CONFIG} for it, so it is not a transformers model; give another one."
