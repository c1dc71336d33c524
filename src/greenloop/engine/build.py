"""The engine that fits a model."""

from __future__ import annotations

from typing import Any

from greenloop.decoder import Decoder, supported, unwrapped
from greenloop.engine.fallback import TransformersEngine
from greenloop.engine.generate import Engine
from greenloop.engine.request import Generator
from greenloop.engine.stopping import Stopper


def make_engine(model: Any, tokenizer: Any, *, rows: int = 0, decoder: Decoder | None = None) -> Generator:
    """Our own engine for the Llama/Qwen family, transformers' forward for every other causal LM.

    Args:
        model: the causal LM.
        tokenizer: its tokenizer.
        rows: completions decoded at a time; 0 leaves it to the engine.
        decoder: the model's fused weights where a trainer holds them already.
    """
    stopper = Stopper.of(unwrapped(model), tokenizer)
    if decoder is not None or supported(model):
        return Engine(decoder or Decoder(model), stopper, rows=rows)
    return TransformersEngine(model, stopper)
