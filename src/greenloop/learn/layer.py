"""One decoder layer with a backward pass of its own: the unit of the training graph.

In: the residual stream of some packs. Out: the residual stream after the layer, and in backward the gradients of the
adapter alone (the base is frozen, so no weight gradient of its size is ever formed). Written out by hand because
autograd over single operations keeps and casts several copies of every activation; here a layer keeps its two residual
inputs, the heads, the attended values and the gate, and computes the rest again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from greenloop.decoder import DecoderLayer
from greenloop.learn.attention import Attention
from greenloop.learn.operations import Operations, Read


@dataclass(frozen=True, slots=True)
class Plan:
    """What the layers of one forward have in common."""

    operations: Operations
    attention: Attention


class Kept(NamedTuple):
    """What a layer's backward needs of its forward."""

    hidden: Tensor
    """[N, d] float32, the residual stream before the layer."""
    middle: Tensor
    """[N, d] float32, the residual stream after attention."""
    attended: Tensor
    """[N, H * D]."""
    gate_up: Tensor
    """[N, 2m]."""
    heads: Any
    """What the attention keeps."""
    read_qkv: Read
    read_output: Read
    read_gate_up: Read
    read_down: Read


def layer_forward(plan: Plan, layer: DecoderLayer, hidden: Tensor) -> Tensor:
    """[N, d] float32 to [N, d] float32, differentiable in the layer's adapter and in `hidden`."""
    adapter = [weight for fused in layer.linears for weight in fused.adapter()]
    out: Tensor = _Layer.apply(hidden, plan, layer, *adapter)
    return out


def reference_forward(plan: Plan, layer: DecoderLayer, hidden: Tensor) -> Tensor:
    """The same of the base alone, without a graph."""
    does = plan.operations
    qkv = does.project_base(layer.qkv, does.normed(layer.input_norm, hidden))
    attended, _ = plan.attention.forward(layer, qkv)
    middle = does.project_base(layer.output, attended, hidden)
    gate_up = does.project_base(layer.gate_up, does.normed(layer.mlp_norm, middle))
    return does.project_base(layer.down, does.gated(gate_up), middle)


def replayed(plan: Plan, layers: Sequence[DecoderLayer], kept: Callable[[int], Kept], hidden: Tensor) -> Tensor:
    """[N, d] after all layers, differentiable in their adapters, where the forward has been made already.

    Args:
        plan: for the backward.
        layers: in their order.
        kept: what the forward left of a layer.
        hidden: [N, d] after the last layer.
    """
    adapter = [weight for layer in layers for fused in layer.linears for weight in fused.adapter()]
    out: Tensor = _Replay.apply(hidden, plan, layers, kept, *adapter)
    return out


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        plan: Plan,
        layers: Sequence[DecoderLayer],
        kept: Callable[[int], Kept],
        *_: Tensor,
    ) -> Tensor:
        ctx.plan, ctx.layers, ctx.kept = plan, layers, kept
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (residual,) = outer
        gradients: list[Tensor] = []
        for index in reversed(range(len(ctx.layers))):
            residual, found = _layer_back(ctx.plan, ctx.layers[index], ctx.kept(index), residual)
            gradients[:0] = found
        return None, None, None, None, *gradients


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, plan: Plan, layer: DecoderLayer, *_: Tensor) -> Tensor:
        does = plan.operations
        qkv, read_qkv = does.project(layer.qkv, does.normed(layer.input_norm, hidden))
        attended, heads = plan.attention.forward(layer, qkv)
        middle, read_output = does.project(layer.output, attended, hidden)
        gate_up, read_gate_up = does.project(layer.gate_up, does.normed(layer.mlp_norm, middle))
        out, read_down = does.project(layer.down, does.gated(gate_up), middle)
        ctx.plan, ctx.layer = plan, layer
        ctx.kept = Kept(hidden, middle, attended, gate_up, heads, read_qkv, read_output, read_gate_up, read_down)
        return out

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.kept
        del ctx.kept
        residual, gradients = _layer_back(ctx.plan, ctx.layer, kept, outer[0])
        return residual, None, None, *gradients


def _layer_back(plan: Plan, layer: DecoderLayer, kept: Kept, residual: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The gradient of the residual stream before the layer, and those of its adapter, from that of the stream after."""
    does = plan.operations
    inner, low = does.project_back(layer.down, kept.read_down, residual)
    opened, of_gate_up = does.gated_back(kept.gate_up, inner)
    of_down = does.adapter_gradients(layer.down, opened, kept.read_down, residual, low)
    inner, low = does.project_back(layer.gate_up, kept.read_gate_up, of_gate_up)
    normed, residual = does.normed_back(layer.mlp_norm, kept.middle, inner, residual)
    of_gate_up_adapter = does.adapter_gradients(layer.gate_up, normed, kept.read_gate_up, of_gate_up, low)

    inner, low = does.project_back(layer.output, kept.read_output, residual)
    of_output = does.adapter_gradients(layer.output, kept.attended, kept.read_output, residual, low)
    of_heads = plan.attention.backward(layer, kept.heads, inner)
    inner, low = does.project_back(layer.qkv, kept.read_qkv, of_heads)
    normed, residual = does.normed_back(layer.input_norm, kept.hidden, inner, residual)
    of_qkv = does.adapter_gradients(layer.qkv, normed, kept.read_qkv, of_heads, low)
    return residual, [*of_qkv, *of_output, *of_gate_up_adapter, *of_down]
