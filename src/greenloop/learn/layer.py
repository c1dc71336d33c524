"""One decoder layer with a backward pass of its own: the unit of the training graph.

In: the residual stream of some packs. Out: the residual stream after the layer, and in backward the gradients of the
adapter alone (the base is frozen, so no weight gradient of its size is ever formed). Written out by hand because
autograd over single operations keeps and casts several copies of every activation; here a layer keeps its two residual
inputs, the heads, the attended values and the gate, and computes the rest again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from greenloop.decoder import DecoderLayer
from greenloop.learn.attention import Attention
from greenloop.learn.operations import Operations


@dataclass(frozen=True, slots=True)
class Plan:
    """What the layers of one forward have in common."""

    operations: Operations
    attention: Attention


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
        ctx.kept = (hidden, middle, attended, gate_up, heads, read_qkv, read_output, read_gate_up, read_down)
        return out

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        plan, layer, does = ctx.plan, ctx.layer, ctx.plan.operations
        hidden, middle, attended, gate_up, heads, read_qkv, read_output, read_gate_up, read_down = ctx.kept
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
        of_heads = plan.attention.backward(layer, heads, inner)
        inner, low = does.project_back(layer.qkv, read_qkv, of_heads)
        normed, residual = does.normed_back(layer.input_norm, hidden, inner, residual)
        of_qkv = does.adapter_gradients(layer.qkv, normed, read_qkv, of_heads, low)
        return residual, None, None, *of_qkv, *of_output, *of_gate_up_adapter, *of_down
