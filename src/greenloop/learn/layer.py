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
from torch import Tensor

from greenloop.decoder import Decoder, DecoderLayer, rotate
from greenloop.learn import tree_attention
from greenloop.learn.operations import Operations, norm_gradient
from greenloop.learn.tree_attention import Layout, Tree


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
    operations: Operations

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
    does = plan.operations
    qkv = does.project_base(layer.qkv, does.normed(layer.input_norm, hidden))
    trees = plan.plant(*plan.decoder.heads_of(layer, qkv, plan.cos, plan.sin))
    middle = does.project_base(layer.output, plan.mix(trees), hidden)
    gate_up = does.project_base(layer.gate_up, does.normed(layer.mlp_norm, middle))
    return does.project_base(layer.down, does.gated(gate_up), middle)


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
        decoder, does = plan.decoder, plan.operations
        qkv, read_qkv = does.project(layer.qkv, does.normed(layer.input_norm, hidden))
        trees = plan.plant(*decoder.heads_of(layer, qkv, plan.cos, plan.sin))
        attended = plan.mix(trees)
        middle, read_output = does.project(layer.output, attended, hidden)
        gate_up, read_gate_up = does.project(layer.gate_up, does.normed(layer.mlp_norm, middle))
        out, read_down = does.project(layer.down, does.gated(gate_up), middle)
        ctx.plan, ctx.layer = plan, layer
        ctx.kept = (hidden, middle, attended, gate_up, trees, read_qkv, read_output, read_gate_up, read_down)
        ctx.projected = qkv[:, : -decoder.kv_heads * decoder.head_width] if layer.query_norm is not None else None
        return out

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        plan, layer, does = ctx.plan, ctx.layer, ctx.plan.operations
        hidden, middle, attended, gate_up, trees, read_qkv, read_output, read_gate_up, read_down = ctx.kept
        del ctx.kept
        (residual,) = outer

        inner, low = does.project_back(layer.down, read_down, residual)
        opened, of_gate_up = does.gated_back(gate_up, inner)
        of_down = does.adapter_gradients(layer.down, opened, read_down, residual, low)
        inner, low = does.project_back(layer.gate_up, read_gate_up, of_gate_up)
        normed, residual = does.normed_back(layer.mlp_norm, middle, inner, residual)
        of_gate_up_adapter = does.adapter_gradients(layer.gate_up, normed, read_gate_up, of_gate_up, low)

        inner, low = does.project_back(layer.output, read_output, residual)
        of_output = does.adapter_gradients(layer.output, attended, read_output, residual, low)
        heads = _projection_gradient(plan, layer, trees, ctx.projected, inner)
        inner, low = does.project_back(layer.qkv, read_qkv, heads)
        normed, residual = does.normed_back(layer.input_norm, hidden, inner, residual)
        of_qkv = does.adapter_gradients(layer.qkv, normed, read_qkv, heads, low)
        return residual, None, None, *of_qkv, *of_output, *of_gate_up_adapter, *of_down


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
            norm_gradient(norm, x, norm.inverse(x), out)
            for norm, x, out in zip(norms, before, turned.split(sizes, dim=1), strict=True)
        ]
        turned = torch.cat(pieces, dim=1).to(v.dtype)
    return torch.cat([turned, v], dim=1).flatten(1)
