"""The engine that fits a model."""

from __future__ import annotations

from typing import Any

from greenloop.engine.decoder import supported, unwrapped
from greenloop.engine.fallback import TransformersEngine
from greenloop.engine.generate import Engine, Generator
from greenloop.engine.stopping import Stopper


def make_engine(model: Any, tokenizer: Any, *, rows: int = 64) -> Generator:
    """Our own engine for the Llama/Qwen family, transformers' forward for every other causal LM."""
    stopper = Stopper.of(unwrapped(model), tokenizer)
    if supported(model):
        return Engine(model, stopper, rows=rows)
    return TransformersEngine(model, stopper)
