"""One decoder layer with a backward pass of its own: the unit of the training graph.

In: the residual stream of some packs. Out: the residual stream after the layer, and in backward the gradients of the
adapter alone (the base is frozen, so no weight gradient of its size is ever formed). Written out by hand because
autograd over single operations keeps and casts several copies of every activation; here a layer keeps its two residual
inputs, the folded heads, the attended values and the gate, and computes the rest again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from greenloop.decoder import Decoder, DecoderLayer, FusedLinear, Norm, gated, rotate
from greenloop.learn import tree_attention
from greenloop.learn.tree_attention import Layout, Tree


@dataclass(frozen=True, slots=True)
class Thinning:
    """Dropout on what the adapter reads (PEFT's `lora_dropout`)."""

    share: float
    """Of the inputs that are set to 0."""
    generator: torch.Generator

    def mask(self, x: Tensor) -> Tensor:
        """Like `x`: 0 or 1 / (1 - share)."""
        keep = torch.rand(x.shape, generator=self.generator, device=x.device) >= self.share
        return keep.to(x.dtype).div_(1 - self.share)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the layers of one forward have in common."""

    decoder: Decoder
    layouts: Sequence[Layout]
    """Which together hold each of the N tokens once."""
    cos: Tensor
    """[N, 1, D / 2]."""
    sin: Tensor
    """[N, 1, D / 2]."""
    thinning: Thinning | None = None

    def plant(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tree]:
        """Each layout's tree of the heads of all N tokens."""
        return [tree_attention.plant(query, key, value, layout, self.decoder.scale) for layout in self.layouts]

    def mix(self, trees: Sequence[Tree]) -> Tensor:
        """[N, H * D] attended values."""
        out = self.decoder.head.new_empty(len(self.cos), self.decoder.heads * self.decoder.head_width)
        for tree, layout in zip(trees, self.layouts, strict=True):
            tree_attention.mix(tree, layout, out)
        return out

    def heads_gradient(self, trees: Sequence[Tree], attended: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query [N, H, D], key and value [N, Hkv, D] from that of the attended values [N, H * D]."""
        decoder = self.decoder
        query, key, value = (
            attended.new_empty(len(attended), heads, decoder.head_width)
            for heads in (decoder.heads, decoder.kv_heads, decoder.kv_heads)
        )
        for tree, layout in zip(trees, self.layouts, strict=True):
            tree_attention.gradients(tree, layout, attended, decoder.scale, (query, key, value))
        return query, key, value


def layer_forward(plan: Plan, layer: DecoderLayer, hidden: Tensor) -> Tensor:
    """[N, d] float32 to [N, d] float32, differentiable in the layer's adapter and in `hidden`."""
    adapter = [weight for fused in layer.linears for weight in fused.adapter()]
    out: Tensor = _Layer.apply(hidden, plan, layer, *adapter)
    return out


def reference_forward(plan: Plan, layer: DecoderLayer, hidden: Tensor) -> Tensor:
    """The same of the base alone, without a graph."""
    qkv = layer.qkv.without_adapter(layer.input_norm(hidden))
    trees = plan.plant(*plan.decoder.heads_of(layer, qkv, plan.cos, plan.sin))
    middle = hidden + layer.output.without_adapter(plan.mix(trees))
    gate_up = layer.gate_up.without_adapter(layer.mlp_norm(middle))
    return middle.add_(layer.down.without_adapter(gated(gate_up)))


@dataclass(frozen=True, slots=True)
class _Read:
    """What a fused layer's backward needs of its forward."""

    low: Tensor
    """[N, rank]."""
    mask: Tensor | None
    """[N, in] of the thinning."""


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, plan: Plan, layer: DecoderLayer, *_: Tensor) -> Tensor:
        decoder = plan.decoder
        qkv, read_qkv = _project(layer.qkv, layer.input_norm(hidden), plan)
        trees = plan.plant(*decoder.heads_of(layer, qkv, plan.cos, plan.sin))
        attended = plan.mix(trees)
        out, read_output = _project(layer.output, attended, plan)
        middle = hidden + out
        gate_up, read_gate_up = _project(layer.gate_up, layer.mlp_norm(middle), plan)
        out, read_down = _project(layer.down, gated(gate_up), plan)
        ctx.plan, ctx.layer = plan, layer
        ctx.kept = (hidden, middle, attended, gate_up, trees, read_qkv, read_output, read_gate_up, read_down)
        ctx.projected = qkv[:, : -decoder.kv_heads * decoder.head_width] if layer.query_norm is not None else None
        return middle + out

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        plan, layer = ctx.plan, ctx.layer
        hidden, middle, attended, gate_up, trees, read_qkv, read_output, read_gate_up, read_down = ctx.kept
        del ctx.kept
        (residual,) = outer
        dtype = attended.dtype

        gate, up = gate_up.chunk(2, dim=-1)
        opened = F.silu(gate)
        inner, of_down = _backward(layer.down, opened * up, read_down, residual.to(dtype))
        normed, inverse = _again(layer.mlp_norm, middle)
        of_gate_up = torch.cat([torch.ops.aten.silu_backward(inner * up, gate), inner * opened], dim=1)
        inner, of_gate_up_adapter = _backward(layer.gate_up, normed, read_gate_up, of_gate_up)
        residual = residual + _norm_gradient(layer.mlp_norm, middle, inverse, inner)

        inner, of_output = _backward(layer.output, attended, read_output, residual.to(dtype))
        heads = _projection_gradient(plan, layer, trees, ctx.projected, inner)
        normed, inverse = _again(layer.input_norm, hidden)
        inner, of_qkv = _backward(layer.qkv, normed, read_qkv, heads)
        residual += _norm_gradient(layer.input_norm, hidden, inverse, inner)
        return residual, None, None, *of_qkv, *of_output, *of_gate_up_adapter, *of_down


def _project(fused: FusedLinear, x: Tensor, plan: Plan) -> tuple[Tensor, _Read]:
    mask = plan.thinning.mask(x) if plan.thinning and fused.rank else None
    joined = fused.joined(x, None if mask is None else x * mask)
    return fused.product(joined), _Read(joined[:, fused.in_features :].contiguous(), mask)


def _backward(fused: FusedLinear, x: Tensor, read: _Read, out: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The gradient of the input [N, in] and those of the adapter, from that of the output [N, out]."""
    joined = out @ fused.weight
    if not fused.rank:
        return joined, []
    inner, low = joined[:, : fused.in_features], joined[:, fused.in_features :].contiguous()
    if read.mask is None:
        inner = torch.addmm(inner, low, fused.down)
    else:
        inner = inner + (low @ fused.down) * read.mask
        x = x * read.mask
    return inner, fused.adapter_gradients(low.T @ x, out.T @ read.low)


def _again(norm: Norm, x: Tensor) -> tuple[Tensor, Tensor]:
    inverse = norm.inverse(x)
    return norm.scaled(x, inverse), inverse


def _norm_gradient(norm: Norm, x: Tensor, inverse: Tensor, out: Tensor) -> Tensor:
    """d/dx of x * inverse(x) * weight, float32: g / rms - x (g . x) / (d rms^3) with g = out * weight."""
    scaled = out * norm.weight
    along = torch.linalg.vecdot(scaled, x)[..., None]
    return scaled.mul_(inverse).addcmul_(x, along.mul_(inverse.pow(3)), value=-1 / x.shape[-1])


def _projection_gradient(
    plan: Plan, layer: DecoderLayer, trees: Sequence[Tree], projected: Tensor | None, attended: Tensor
) -> Tensor:
    """The gradient of the fused projection [N, out] from that of the attended values [N, H * D].

    Args:
        plan: of the forward.
        layer: the layer.
        trees: of the forward.
        projected: [N, (H + Hkv) * D] queries and keys before their norms; None where there are none.
        attended: the gradient.
    """
    decoder = plan.decoder
    q, k, v = plan.heads_gradient(trees, attended)
    turned = rotate(torch.cat([q, k], dim=1), plan.cos, -plan.sin)
    if projected is not None:
        norms = [norm for norm in (layer.query_norm, layer.key_norm) if norm is not None]
        sizes = [decoder.heads, decoder.kv_heads]
        before = projected.unflatten(-1, (-1, decoder.head_width)).float().split(sizes, dim=1)
        pieces = [
            _norm_gradient(norm, x, norm.inverse(x), out)
            for norm, x, out in zip(norms, before, turned.split(sizes, dim=1), strict=True)
        ]
        turned = torch.cat(pieces, dim=1).to(v.dtype)
    return torch.cat([turned, v], dim=1).flatten(1)
