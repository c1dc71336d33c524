"""From a `ModelSource` to a model that computes and its tokenizer.

In: what `resolve` found, a precision and a device. Out: the model in evaluation mode with frozen base weights.
Knows nothing of prompts, sampling or training; an adapter stays an adapter (it is never merged into the weights).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from greenloop.errors import ModelError
from greenloop.models.check import check
from greenloop.models.device import choose_device, choose_dtype
from greenloop.models.quiet import without_progress_bars
from greenloop.models.spec import Kind, ModelSource
from greenloop.models.tokenizer import load_tokenizer

UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that is ready to compute."""

    model: PreTrainedModel | PeftModel
    """In evaluation mode; base weights have `requires_grad` False. `PeftModel` if the source has an adapter."""
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    dtype: torch.dtype
    """Of the base weights; adapter weights are float32."""
    device: torch.device

    @property
    def weights_sha256(self) -> str:
        """Identity of the base weights: a content hash, for hub models the commit hash."""
        return self.source.weights_sha256


def load_model(
    source: ModelSource, *, dtype: str = "auto", device: str = "auto", is_trainable: bool = False
) -> LoadedModel:
    """Read the weights (a GGUF file is converted on its first load) and the adapter, if there is one.

    Args:
        source: As `resolve` returned it.
        dtype: `auto`, `float32` or `bfloat16`, of the base weights.
        device: `auto`, `cpu`, `cuda`, `cuda:1` ...
        is_trainable: Whether the weights of the source's adapter take gradients.

    Raises:
        ModelError: what `check` raises; weights missing, damaged or of another shape than the config says.
        ConfigError: no such dtype or device.
    """
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    check(source)
    tokenizer = load_tokenizer(source)
    model: PreTrainedModel | PeftModel = _base_model(source, chosen_dtype).to(chosen_device)
    if source.adapter is not None:
        model = _adapted(model, source, is_trainable)
    return LoadedModel(model=model.eval(), tokenizer=tokenizer, source=source, dtype=chosen_dtype, device=chosen_device)


def _base_model(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    weights = source.weights
    on_hub = weights.kind is Kind.HUB
    place = {"revision": weights.revision} if on_hub else {"local_files_only": True}
    try:
        # A download may take minutes, so it keeps its bar.
        with nullcontext() if on_hub else without_progress_bars():
            model, report = AutoModelForCausalLM.from_pretrained(
                weights.base_name, dtype=dtype, output_loading_info=True, trust_remote_code=False, **place
            )
    except UNREADABLE as error:
        raise ModelError(
            f"{source.spec}: the weights in {weights.base_name} cannot be loaded ({_first_line(error)}); "
            "check the network and the disk, or fetch the model again."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{source.spec}: the weights in {weights.base_name} lack {missing[0]} and "
            f"{len(missing) - 1} more that its config asks for; fetch the model again."
        )
    return model.requires_grad_(False)


def _adapted(model: PreTrainedModel, source: ModelSource, is_trainable: bool) -> PeftModel:
    device = str(model.device)
    try:
        return PeftModel.from_pretrained(model, str(source.adapter), is_trainable=is_trainable, torch_device=device)
    except (*UNREADABLE, TypeError) as error:
        raise ModelError(
            f"{source.spec}: the adapter in {source.adapter} does not fit its base {source.base_name} "
            f"({_first_line(error)})."
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
