"""The policy: a frozen base model with a LoRA adapter (PEFT), and its log-probs over packs.

The reference policy is the same model with the adapter disabled. The base stays in its dtype, the adapter in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from greenloop.errors import ConfigError
from greenloop.learn import tree_attention
from greenloop.learn.logprob import Scored, score
from greenloop.learn.lora_linear import speed_up
from greenloop.learn.packing import Pack
from greenloop.recipe import LoraSection
from greenloop.seeding import seed_for

_PACKABLE = frozenset({"llama", "qwen2", "qwen3", "mistral"})


def adapt(model: Any, lora: LoraSection, seed: int, base_name: str) -> PeftModel:
    """The model with a fresh adapter (B = 0), its A drawn from the seed alone.

    Args:
        model: transformers causal LM; its weights are frozen.
        lora: rank, alpha, dropout and targets.
        seed: root seed of the run.
        base_name: what the adapter's config names as its base.

    Raises:
        ConfigError: a target that the model lacks, or the output head.
    """
    targets = lora.targets
    if isinstance(targets, list) and "lm_head" in targets:
        raise ConfigError("lora.targets: lm_head cannot be adapted (log-probs are computed in chunks); leave it out")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "lora"))
        try:
            policy = get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(f"lora.targets: {targets}: the model has no such modules ({error})") from None
    policy.peft_config["default"].base_model_name_or_path = base_name
    return policy


class Policy:
    """Log-probs of completions under the adapter and under the base."""

    def __init__(self, model: PeftModel, temperature: float) -> None:
        self.model = model
        self.temperature = temperature
        self.causal: Any = model.get_base_model()
        self.device: torch.device = self.causal.lm_head.weight.device
        config = self.causal.config
        if config.model_type not in _PACKABLE:
            raise ConfigError(
                f"model: training packs groups for {', '.join(sorted(_PACKABLE))} only, not {config.model_type}; "
                "use a model of these families"
            )
        model.train()
        speed_up(model)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The adapter's weights, in a fixed order."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def logprobs(self, pack: Pack) -> Scored:
        """Log-prob and entropy of each of the pack's trained tokens, [M] each."""
        pack = pack.to(self.device)
        hidden = self._hidden(pack)
        return score(hidden[pack.scored], self.causal.lm_head.weight, pack.labels, self.temperature)

    @torch.no_grad()
    def reference_logprobs(self, pack: Pack) -> Tensor:
        """[M] log-probs under the base model."""
        with self.model.disable_adapter():
            return self.logprobs(pack).logprobs

    def save(self, folder: Path) -> None:
        """Write the adapter in PEFT's own format."""
        self.model.save_pretrained(str(folder), save_embedding_layers=False)

    def _hidden(self, pack: Pack) -> Tensor:
        """[N, d] hidden states after the final norm."""
        with _tree_attention(self.causal):
            output = self.causal.model(
                input_ids=pack.token_ids[None], position_ids=pack.positions[None], use_cache=False, pack=pack
            )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden


@contextmanager
def _tree_attention(model: Any) -> Iterator[None]:
    """The model attends along packs inside; its own attention is put back after."""
    before = model.config._attn_implementation
    model.config._attn_implementation = tree_attention.NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
