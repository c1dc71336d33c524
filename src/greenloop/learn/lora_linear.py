"""A LoRA layer's forward and backward in the base's own dtype, in place of PEFT's.

PEFT casts every input to the adapter's float32, multiplies there and keeps the copies for backward; with a bfloat16
base that is most of the memory traffic of a step. Here the adapter stays float32 where it is stored and stepped, and is
rounded to the base's dtype for the products, as the sampler does. In float32 the mathematics is PEFT's exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor


def speed_up(model: PeftModel) -> None:
    """Replace the forward of every plain LoRA layer without dropout; other layers keep PEFT's."""
    for module in model.modules():
        if type(module) is LoraLinear and not module.lora_bias["default"] and _plain(module):
            module.forward = _Forward(module)


def _plain(layer: Any) -> bool:
    dropout = layer.lora_dropout["default"]
    return (
        list(layer.lora_A) == ["default"] and isinstance(dropout, torch.nn.Identity) and not layer.use_dora["default"]
    )


class _Forward:
    """`forward` of one layer."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        base = layer.get_base_layer()
        if layer.disable_adapters:
            out: Tensor = base(x)
            return out
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        flat = x.reshape(-1, x.shape[-1])
        result: Tensor = _LoraProduct.apply(flat, base.weight, base.bias, down, up, layer.scaling["default"])
        return result.view(*x.shape[:-1], -1)


class _LoraProduct(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T, with W and b frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        low_down, low_up = down.to(x.dtype), up.to(x.dtype) * scale
        narrow = x @ low_down.T
        y = torch.nn.functional.linear(x, weight, bias)
        y.addmm_(narrow, low_up.T)
        ctx.save_for_backward(x, weight, narrow, low_down, low_up)
        ctx.scale, ctx.dtype = scale, down.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, weight, narrow, down, up = ctx.saved_tensors
        dnarrow = dy @ up
        ddown = (dnarrow.T @ x).to(ctx.dtype)
        dup = (dy.T @ narrow).to(ctx.dtype) * ctx.scale
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(dnarrow, down)
        return dx, None, None, ddown, dup, None
