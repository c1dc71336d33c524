"""A Llama or Qwen decoder as plain functions over fused weights.

In: a transformers causal LM, with or without PEFT's LoRA layers. Out: hidden states. The attention itself is the
caller's: prefill and decode read different caches. Not for training: nothing here keeps a graph.

q, k and v (and gate and up) are one matrix each. The low-rank path stays separate (merging LoRA into bfloat16 weights
rounds the update away), but its A matrices are further rows of the fused matrix, so that one product gives both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SUPPORTED = frozenset({"llama", "qwen2", "qwen3", "mistral"})

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [N, H, D], k [N, Hkv, D], v [N, Hkv, D]) -> [N, H * D]."""


class FusedLinear:
    """Several linear layers that read the same input, as one product, with their LoRA paths.

    The layers' own weights become views of the fused matrix, so the memory is paid once.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        self.layers = layers
        bases = [_base(layer) for layer in layers]
        self.widths = [base.weight.shape[0] for base in bases]
        self.out_features = sum(self.widths)
        rank = sum(_rank(layer) for layer in layers)
        first = bases[0].weight
        self.weight = torch.empty(self.out_features + rank, first.shape[1], dtype=first.dtype, device=first.device)
        self.up = torch.zeros(rank, self.out_features, dtype=first.dtype, device=first.device)
        self.bias = _fused_bias(bases, rank)
        row = 0
        for base, width in zip(bases, self.widths, strict=True):
            self.weight[row : row + width].copy_(base.weight)
            base.weight.data = self.weight[row : row + width]
            row += width
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the adapter's present values."""
        row, column = self.out_features, 0
        for layer, width in zip(self.layers, self.widths, strict=True):
            rank = _rank(layer)
            if rank:
                down, up, scale = _lora(layer)
                self.weight[row : row + rank].copy_(down)
                start = row - self.out_features
                self.up[start : start + rank, column : column + width].copy_(up.T * scale)
            row += rank
            column += width

    def __call__(self, x: Tensor) -> Tensor:
        """[N, in] to [N, sum of the layers' outputs]."""
        both = F.linear(x, self.weight, self.bias)
        if not self.up.shape[0]:
            return both
        return torch.addmm(both[:, : self.out_features], both[:, self.out_features :], self.up)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The weights of one layer."""

    input_norm: nn.Module
    qkv: FusedLinear
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    output: FusedLinear
    mlp_norm: nn.Module
    gate_up: FusedLinear
    down: FusedLinear


class Decoder:
    """Weights of a supported causal LM, fused for inference."""

    def __init__(self, model: nn.Module) -> None:
        causal = unwrapped(model)
        config = causal.config
        self.inner: Any = causal.model
        self.head: Tensor = causal.lm_head.weight
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.activation = self.inner.layers[0].mlp.act_fn
        self.layers = [_layer(layer) for layer in self.inner.layers]
        self._cos = self._sin = torch.empty(0)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and the caches."""
        return self.head.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.device

    def refresh(self) -> None:
        """Take the adapter's present values."""
        for layer in self.layers:
            for fused in (layer.qkv, layer.output, layer.gate_up, layer.down):
                fused.refresh()

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """[N] tokens at [N] positions to [N, d] hidden states after the final norm."""
        hidden = self.inner.embed_tokens(token_ids)
        cos, sin = self._rotary(positions)
        for index, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, layer.input_norm(hidden), cos, sin)
            hidden = hidden + layer.output(attend(index, q, k, v))
            gate, up = layer.gate_up(layer.mlp_norm(hidden)).split(layer.gate_up.widths, dim=-1)
            hidden = hidden + layer.down(self.activation(gate) * up)
        normed: Tensor = self.inner.norm(hidden)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, d] to [N, V]."""
        return F.linear(hidden, self.head)

    def _qkv(self, layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = layer.qkv(x).split(layer.qkv.widths, dim=-1)
        q = q.unflatten(-1, (self.heads, self.head_width))
        k = k.unflatten(-1, (self.kv_heads, self.head_width))
        v = v.unflatten(-1, (self.kv_heads, self.head_width))
        if layer.query_norm is not None and layer.key_norm is not None:
            q, k = layer.query_norm(q), layer.key_norm(k)
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 1, D] cosines and sines, from a table that grows as needed."""
        needed = int(positions.max()) + 1
        if needed > self._cos.shape[0]:
            table = torch.arange(max(needed, 1024), device=self.device)[None]
            cos, sin = self.inner.rotary_emb(torch.empty(1, dtype=self.dtype, device=self.device), table)
            self._cos, self._sin = cos[0, :, None], sin[0, :, None]
        return self._cos[positions], self._sin[positions]


def supported(model: nn.Module) -> bool:
    """Whether `Decoder` computes this model: a Llama or Qwen stack with full attention and fixed rotary angles."""
    config: Any = unwrapped(model).config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return config.model_type in SUPPORTED and rope in {"default", "linear", "llama3", "yarn"} and not windowed


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    peft: Any = model
    return peft.get_base_model() if hasattr(model, "get_base_model") else model


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def _layer(layer: Any) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    return DecoderLayer(
        input_norm=layer.input_layernorm,
        qkv=FusedLinear([attention.q_proj, attention.k_proj, attention.v_proj]),
        query_norm=getattr(attention, "q_norm", None),
        key_norm=getattr(attention, "k_norm", None),
        output=FusedLinear([attention.o_proj]),
        mlp_norm=layer.post_attention_layernorm,
        gate_up=FusedLinear([mlp.gate_proj, mlp.up_proj]),
        down=FusedLinear([mlp.down_proj]),
    )


def _base(layer: Any) -> Any:
    """The frozen linear under a LoRA layer."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _rank(layer: Any) -> int:
    adapters = getattr(layer, "lora_A", None)
    active = getattr(layer, "active_adapters", [])
    return sum(adapters[name].weight.shape[0] for name in active if name in adapters) if adapters else 0


def _lora(layer: Any) -> tuple[Tensor, Tensor, float]:
    """A [r, in], B [out, r] and the scale of the one active adapter."""
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])


def _fused_bias(bases: list[Any], rank: int) -> Tensor | None:
    if all(base.bias is None for base in bases):
        return None
    weight = bases[0].weight
    parts = [weight.new_zeros(base.weight.shape[0]) if base.bias is None else base.bias.data for base in bases]
    return torch.cat([*parts, weight.new_zeros(rank)])
