"""The tokenizer of a model, from its adapter's folder where that has one, else from the base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from greenloop.errors import ModelError
from greenloop.models.convert import convert
from greenloop.models.spec import Kind, ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_CONFIG = "tokenizer_config.json"


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model; a GGUF file is converted for it if it was not.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    weights = source.weights
    if weights.gguf is not None:
        convert(weights.gguf, weights.weights_sha256, weights.folder)
    try:
        if weights.kind is Kind.HUB and not _has_own(source.adapter):
            return AutoTokenizer.from_pretrained(weights.base_name, revision=weights.revision, trust_remote_code=False)
        folder = source.adapter if _has_own(source.adapter) else weights.folder
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{source.spec}: no usable tokenizer beside the model; "
            "put its tokenizer.json and tokenizer_config.json there."
        ) from error


def _has_own(adapter: Path | None) -> bool:
    return adapter is not None and (adapter / TOKENIZER_CONFIG).is_file()
