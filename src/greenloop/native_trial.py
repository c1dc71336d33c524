"""Whether native code computes on this processor what PyTorch's operations compute.

It is made for the vectors of the processor at hand, so no test elsewhere has seen it run. Where it is made anew it is
tried first, with a model of nothing but random numbers: what the sampler says of its tokens, the gradients from the
activations that it leaves, and those of a forward of their own. Where that is wrong, native code is left off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from greenloop.decoder import supported
from greenloop.decoder.native import Product, blocks_of, rounds, team
from greenloop.decoder.native.layout import PANEL
from greenloop.decoder.native.narrow import nearest
from greenloop.engine.generate import Engine
from greenloop.engine.request import Request, Sampling
from greenloop.engine.stopping import Stopper
from greenloop.learn.packing import Pack, pack
from greenloop.learn.policy import Policy, adapt
from greenloop.models.device import choose_device
from greenloop.models.load import LoadedModel, load_model
from greenloop.models.spec import ModelSource
from greenloop.recipe import LoraSection
from greenloop.tuning import cpu_name

TOLERANCE = 1e-3
"""Nats a token, and of a gradient its share; rounding makes 1e-5."""
_COARSER = 30
"""Times as much may come of products of rounded values."""

_SAMPLES, _WARM = 7, Sampling(temperature=1.0, max_new_tokens=40)
_ENDS = frozenset(range(0, 304, 16))
"""One token of sixteen ends a completion, so that steps have many rows and few."""
_PROMPTS = [tuple(range(3, 43)), tuple(range(3, 20)), tuple(range(50, 55))]


def load_and_try(source: ModelSource, say: Callable[[str], None], *, dtype: str, device: str) -> LoadedModel:
    """`load_model`, then `try_native_code`. What is to be compiled first is compiled while the model is loaded.

    Says so where another `matmul_precision` than the highest was asked for in vain.

    Raises:
        UsageError: see `load_model`.
    """
    if choose_device(device).type == "cpu":
        team.begin()
    loaded = load_model(source, dtype=dtype, device=device)
    try_native_code(loaded.model, say)
    if precision_of(loaded) != torch.get_float32_matmul_precision():
        say(
            'matmul_precision = "high" changes nothing here: it is for float32 weights on a GPU or on a processor with '
            "AVX-512 VNNI or AVX-VNNI"
        )
    return loaded


def precision_of(loaded: LoadedModel) -> str:
    """The `matmul_precision` that the model's products have: the highest where another was asked for in vain."""
    takes_it = loaded.device.type != "cpu" or (rounds() and supported(loaded.model))
    vain = loaded.dtype != torch.float32 or not takes_it
    return "highest" if vain else torch.get_float32_matmul_precision()


def try_native_code(model: Any, say: Callable[[str], None]) -> None:
    """Try native code before this model's first use of it, once for each processor and version of the code.

    Args:
        model: the causal LM, with or without adapter.
        say: takes lines for the user: what takes time, and whether native code is left off.
    """
    if not supported(model) or next(model.parameters()).device.type != "cpu":
        return
    if not team.available() or team.is_trusted():
        return
    say("compiling native code for this processor and trying it, once: about a minute")
    difference = disagreement()
    if difference < TOLERANCE:
        team.trust()
    else:
        team.leave_off()
        say(
            f"warning: native code computes something else than PyTorch on this processor ({cpu_name()}; off by "
            f"{difference:.1g}) and is left off: all is right, and several times slower. Please report it"
        )


def disagreement() -> float:
    """The largest difference between native code and PyTorch's operations, as `TOLERANCE` counts; NaN is infinite."""
    found = [_half_product()]
    with matmul_precision("highest"):
        found.append(_disagreement())
    with matmul_precision("high"):
        if rounds():
            found.append(_disagreement() / _COARSER)
    return max(math.inf if math.isnan(one) else one for one in found)


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Products of float32 values of this precision meanwhile."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _disagreement() -> float:
    """Of a decoder as it is made now."""
    model = random_model()
    policy = Policy(model, _WARM.temperature)
    policy.remember(2**26)
    try:
        packs, drawn = _sampled(policy)
    except IndexError:
        # There is nothing to draw where all is NaN.
        return math.inf
    replayed = slopes(policy, packs)
    # Forgets what the sampler has left.
    policy.refresh()
    computed = slopes(policy, packs)
    with team.without_native_code(), matmul_precision("highest"):
        exact = slopes(Policy(model, _WARM.temperature), packs)
    differences = [_apart(drawn, exact[0])]
    for logprobs, gradients in (replayed, computed):
        differences.append(_apart(logprobs, exact[0]))
        pairs = zip(gradients, exact[1], strict=True)
        differences += [float((one - other).norm() / other.norm()) for one, other in pairs]
    return max(math.inf if math.isnan(one) else one for one in differences)


def random_model() -> Any:
    """A Llama of random numbers with an adapter; wide enough for every size of tile and panel."""
    config = LlamaConfig(
        vocab_size=304,
        hidden_size=96,
        intermediate_size=PANEL + 96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=128,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        llama = LlamaForCausalLM(config)
        _quantise(llama.model.layers[0], 4)
        _quantise(llama.lm_head, 8)
        model = adapt(llama, LoraSection(rank=4, alpha=8), seed=0, base_name="random")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def _quantise(module: nn.Module, bits: int) -> None:
    """Round a module's linear layers to weights that native code reads in few bits."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.copy_(in_few_bits(layer.weight, bits))


def in_few_bits(weight: Tensor, bits: int) -> Tensor:
    """The [out, in] weight rounded as a file with 4 bits and an offset (Q4_1), or with 8 bits (Q8_0), has it."""
    codes, scales, offsets = nearest(weight, bits)
    return (codes * scales + offsets).flatten(1)


class _NoText:
    """A tokenizer without text."""

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Nothing."""
        return ""


def _sampled(policy: Policy) -> tuple[list[Pack], Tensor]:
    """A rollout's packs, and what the sampler says of their tokens."""
    engine = Engine(policy.decoder, Stopper(_NoText(), _ENDS))
    wanted = [Request(token_ids=prompt, samples=_SAMPLES, seed=seed) for seed, prompt in enumerate(_PROMPTS)]
    with policy.recording():
        found = {(one.group, one.sample): one for one in engine.generate(wanted, _WARM)}
    packs, drawn = [], []
    for group, prompt in enumerate(_PROMPTS):
        completions = [found[group, k] for k in range(_SAMPLES)]
        packs.append(pack(prompt, [one.token_ids for one in completions], range(_SAMPLES)))
        drawn += [logprob for one in completions for logprob in one.logprobs]
    return packs, torch.tensor(drawn)


def slopes(policy: Policy, packs: Sequence[Pack]) -> tuple[Tensor, list[Tensor]]:
    """Log-probs of all tokens, and the parameters' gradients of a sum of them with weights of both signs."""
    policy.model.zero_grad()
    scored = torch.cat([one.logprobs for one in policy.logprobs(packs)])
    (scored * torch.linspace(-1, 2, len(scored))).sum().backward()
    gradients = [parameter.grad.clone() for parameter in policy.parameters if parameter.grad is not None]
    return scored.detach(), gradients


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _half_product() -> float:
    """The same of a product with bfloat16 weights, which no decoder here has."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(50, 40, generator=generator).bfloat16()
    x = torch.randn(13, 40, generator=generator)
    return _apart(Product(weight, blocks_of(weight))(x), x @ weight.float().T)
