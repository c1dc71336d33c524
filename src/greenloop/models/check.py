"""What can be wrong with a model that was found, before any weights are read.

In: a `ModelSource`. Out: nothing, or one `ModelError`. Imports transformers, but builds no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from greenloop.errors import ModelError
from greenloop.models.gguf import converted_from, read_header
from greenloop.models.spec import ModelSource
from greenloop.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check(source: ModelSource, *, chat_template: bool = False) -> None:
    """Raise what would keep `load_model` from working, as far as it shows without the weights.

    Args:
        source: As `resolve` returned it.
        chat_template: Whether the prompts need the tokenizer's chat template.

    Raises:
        ModelError: not a causal language model that transformers knows, no tokenizer, or no chat template.
    """
    weights = source.weights
    unconverted = weights.gguf is not None and converted_from(weights.folder) is None
    if unconverted:
        _check_gguf(source)
    else:
        _check_config(source)
    if chat_template and not (_gguf_has_template(source) if unconverted else load_tokenizer(source).chat_template):
        raise ModelError(
            f"{source.spec}: its tokenizer has no chat template, which the prompt protocol needs; "
            "choose an instruct model or a protocol without chat, e.g. mbpp-3shot."
        )


def _check_gguf(source: ModelSource) -> None:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    path = source.weights.gguf
    assert path is not None
    architecture = read_header(path).architecture
    if architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        raise ModelError(
            f"{source.spec}: transformers cannot read GGUF files of architecture {architecture!r}; "
            "give the model as a Hugging Face folder or hub id."
        )


def _gguf_has_template(source: ModelSource) -> bool:
    path = source.weights.gguf
    assert path is not None
    return read_header(path).has_chat_template


def _check_config(source: ModelSource) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = _read_config(source)
    mapped = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())
    names = {known.__name__ for known in (mapped if isinstance(mapped, tuple | list) else (mapped,))}
    declared = set(config.architectures or names)
    if not names & declared:
        raise ModelError(
            f"{source.spec}: {', '.join(sorted(declared)) or config.model_type} is not a causal language model; "
            "give one that writes text from left to right, e.g. of the Llama or Qwen family."
        )


def _read_config(source: ModelSource) -> PreTrainedConfig:
    from transformers import AutoConfig

    folder = source.weights.folder
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{source.spec}: {folder / 'config.json'} names no architecture that the installed transformers knows; "
            "update transformers, or give another model."
        ) from error
