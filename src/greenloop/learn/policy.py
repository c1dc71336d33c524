"""The policy: a frozen base model with a LoRA adapter (PEFT), and its log-probs over packs.

The reference policy is the same model without the adapter. The base stays in its dtype, the adapter in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from greenloop.decoder import SUPPORTED, Decoder, DecoderLayer, supported, unwrapped
from greenloop.decoder.native import reads
from greenloop.decoder.traces import Traces
from greenloop.errors import ConfigError
from greenloop.learn.attention import attention_for
from greenloop.learn.layer import Kept, Plan, layer_forward, reference_forward, replayed
from greenloop.learn.logprob import Scored, score
from greenloop.learn.operations import Operations, Read, Thinning, operations_for
from greenloop.learn.packing import Pack
from greenloop.recipe import LoraSection
from greenloop.seeding import seed_for

_CPU_TOKENS = 2048
_GPU_TOKENS = 32768
LayerForward = Callable[[Plan, DecoderLayer, Tensor], Tensor]


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

    def __init__(self, model: PeftModel, temperature: float, *, together: bool | None = None) -> None:
        """Of a model that `adapt` returned.

        Args:
            model: with its adapter.
            temperature: of the sampling.
            together: attend to the packs of a forward in common products, padded; None does so on a GPU, which waits
                for launches. A processor would compute the padding.

        Raises:
            ConfigError: a model of another kind than the decoder computes.
        """
        self.model = model
        self.temperature = temperature
        if not supported(model):
            raise ConfigError(
                f"model: training needs a {', '.join(sorted(SUPPORTED))} model with full attention and plain LoRA on "
                f"its linear layers, this is {unwrapped(model).config.model_type}; use a model of these families"
            )
        self.decoder = Decoder(model)
        on_gpu = self.decoder.device.type == "cuda"
        self.together = on_gpu if together is None else together
        self.most_tokens = self._kept_tokens() if on_gpu else _CPU_TOKENS
        """Packed tokens of one group in a forward and backward."""
        self.batch_tokens = self.most_tokens if on_gpu else _CPU_TOKENS // 2
        """Packed tokens of several groups that are worth one forward: more only costs a processor memory."""
        dropout = model.peft_config["default"].lora_dropout
        self._thinning = Thinning(dropout, torch.Generator(self.decoder.device)) if dropout else None
        self._operations: Operations = operations_for(self.decoder, self._thinning)
        model.train()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The adapter's weights, in a fixed order."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _kept_tokens(self) -> int:
        """Packed tokens whose activations a quarter of a GPU's free memory keeps.

        Each layer keeps two residual inputs in float32, the heads twice, the attended values and the gate.
        """
        decoder = self.decoder
        kept: int = sum(
            8 * layer.qkv.in_features
            + decoder.head.element_size()
            * (2 * len(layer.qkv.weight) + layer.output.in_features + len(layer.gate_up.weight))
            for layer in decoder.layers
        )
        free: int = torch.cuda.mem_get_info(decoder.device)[0]
        return max(_CPU_TOKENS, min(free // 4 // kept, _GPU_TOKENS))

    def refresh(self) -> None:
        """Take the adapter's present values: to be called after each optimiser step."""
        self.decoder.refresh()

    @contextmanager
    def interpolated(self, share: float) -> Iterator[None]:
        """Between base and trained model meanwhile: every B times `share`, and all that is computed or saved with it.

        Linear interpolation of the weights (WiSE-FT, Wortsman et al. 2022, section 3; at the end of RL in WARP, Rame et
        al. 2024), where the base has B = 0. Afterwards the weights are what they were, bit for bit.

        Args:
            share: 0 is the base, 1 what was trained.
        """
        if share == 1:
            yield
            return
        ups = [up.data for name, up in self.model.named_parameters() if "lora_B" in name]
        before = [up.clone() for up in ups]
        try:
            torch._foreach_mul_(ups, share)
            self.refresh()
            yield
        finally:
            torch._foreach_copy_(ups, before)
            self.refresh()

    def seed_dropout(self, seed: int) -> None:
        """Dropout masks are drawn from here on with this seed (nothing happens at dropout 0)."""
        if self._thinning is not None:
            self._thinning.generator.manual_seed(seed)

    def logprobs(self, packs: Sequence[Pack]) -> list[Scored]:
        """Log-prob and entropy of each of the packs' trained tokens, [M] each, from one forward."""
        return self._scored(packs, layer_forward)

    @torch.no_grad()
    def reference_logprobs(self, packs: Sequence[Pack]) -> list[Tensor]:
        """[M] log-probs under the base model, pack by pack."""
        return [scored.logprobs for scored in self._scored(packs, reference_forward)]

    def save(self, folder: Path) -> None:
        """Write the adapter in PEFT's own format."""
        self.model.save_pretrained(str(folder), save_embedding_layers=False)

    def remember(self, memory: int) -> None:
        """Let rollouts leave what they compute for the update that follows.

        Without effect where the decoder computes nothing that training could take: it needs native code for both.

        Args:
            memory: bytes at most.
        """
        decoder = self.decoder
        if memory and decoder.native and reads(decoder.head) and self._thinning is None:
            decoder.traces = Traces(decoder, memory)

    @property
    def room(self) -> int:
        """Tokens whose values rollouts can leave for the update that follows; 0 if they leave none."""
        return 0 if self.decoder.traces is None else len(self.decoder.traces.values)

    def recording(self) -> AbstractContextManager[None]:
        """While rollouts run whose update follows; what earlier ones left is forgotten."""
        return nullcontext() if self.decoder.traces is None else self.decoder.traces.record()

    def _traced(self, packs: Sequence[Pack]) -> Tensor | None:
        """[N] the places of the packs' tokens in the decoder's traces, if all have one."""
        traces = self.decoder.traces
        if traces is None:
            return None
        found: list[int] = []
        for pack in packs:
            paths = pack.paths()
            places = traces.found(paths[pack.prompt_tokens - 1], paths)
            if places is None:
                return None
            found.extend(places)
        return torch.tensor(found)

    def _replayed(self, plan: Plan, places: Tensor) -> Tensor:
        """[N, d] after all layers, from the decoder's traces."""
        traces = self.decoder.traces
        assert traces is not None, "places are of traces"
        # One space for all layers: what a layer leaves would lie between theirs, and no two would share memory.
        space = torch.empty(len(places), traces.layer_width)

        def kept(layer: int) -> Kept:
            found = traces.layer(layer, places, space)
            return Kept(
                found["hidden"],
                found["middle"],
                found["attended"],
                found["gate_up"],
                (found["qkv"], None),
                *(Read(found[f"low_{name}"]) for name in ("qkv", "output", "gate_up", "down")),
            )

        return replayed(plan, self.decoder.layers, kept, traces.last()[places])

    def _scored(self, packs: Sequence[Pack], through: LayerForward) -> list[Scored]:
        decoder, device = self.decoder, self.decoder.device
        decoder.reserve(max(pack.end for pack in packs))
        starts = accumulate((len(pack.token_ids) for pack in packs), initial=0)
        token_ids, positions, labels = (
            torch.cat([getattr(pack, name) for pack in packs]).to(device)
            for name in ("token_ids", "positions", "labels")
        )
        scored = torch.cat([pack.scored + start for pack, start in zip(packs, starts, strict=False)]).to(device)
        cos, sin = decoder.rotary(positions)
        plan = Plan(self._operations, attention_for(decoder, packs, cos, sin, together=self.together))
        places = self._traced(packs) if through is layer_forward else None
        if places is not None:
            hidden = self._replayed(plan, places)
        else:
            hidden = decoder.embed(token_ids)
            for layer in decoder.layers:
                hidden = through(plan, layer, hidden)
        # Not hidden[scored]: on a processor the way back of an index adds in another order each time.
        edges = score(decoder.norm(hidden.index_select(0, scored)), decoder.lm_head, labels, self.temperature)
        pieces = edges.split([len(pack.labels) for pack in packs])
        return [piece.at(pack.edges.to(device)) for piece, pack in zip(pieces, packs, strict=True)]
