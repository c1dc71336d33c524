"""What a layer's forward and backward consist of beside attention: PyTorch's operations, or native code on a processor.

Native code reads and writes what several of PyTorch's operations would read and write in turn, multiplies without a
second copy of the weights, and does not round in between; it needs float32 weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from greenloop.decoder import Decoder, FusedLinear, Norm, gated
from greenloop.decoder.native import reads, rows, sums


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
class Read:
    """What a fused layer's backward needs of its forward."""

    low: Tensor | None
    """[N, rank]: x A^T; None without adapters."""
    mask: Tensor | None = None
    """[N, in] of the thinning."""


class Operations(Protocol):
    """On N tokens at once; gradients are those of a loss to be lowered."""

    def normed(self, norm: Norm, x: Tensor) -> Tensor:
        """[N, d] float32 to [N, d] in the weights' dtype."""

    def normed_back(self, norm: Norm, x: Tensor, gradient: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """`normed` again, and `residual` plus the gradient of x, float32, from that of `normed`."""

    def gated(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up: [N, 2m] to [N, m]."""

    def gated_back(self, gate_up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """`gated` again, and the gradient of gate_up [N, 2m] from that of `gated` [N, m]."""

    def project(self, fused: FusedLinear, x: Tensor, plus: Tensor | None = None) -> tuple[Tensor, Read]:
        """[N, in] to [N, out], added to `plus` (float32) if that is given."""

    def project_base(self, fused: FusedLinear, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """The same of the base alone."""

    def project_back(self, fused: FusedLinear, read: Read, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of the input [N, in] and of `read.low` from that of the output [N, out]."""

    def adapter_gradients(
        self, fused: FusedLinear, x: Tensor, read: Read, gradient: Tensor, low: Tensor | None
    ) -> list[Tensor]:
        """Of `fused.adapter()`, from the input [N, in] and the gradients of the output and of `read.low`."""


class Torch:
    """PyTorch's operations, on any device and in any dtype."""

    def __init__(self, thinning: Thinning | None = None) -> None:
        self.thinning = thinning

    def normed(self, norm: Norm, x: Tensor) -> Tensor:
        """RMS norm."""
        return norm(x)

    def normed_back(self, norm: Norm, x: Tensor, gradient: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Its gradient."""
        inverse = norm.inverse(x)
        return norm.scaled(x, inverse), residual + norm_gradient(norm, x, inverse, gradient)

    def gated(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up."""
        return gated(gate_up)

    def gated_back(self, gate_up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Its gradient."""
        gate, up = gate_up.chunk(2, dim=-1)
        opened = F.silu(gate)
        of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return opened * up, torch.cat([of_gate, gradient * opened], dim=1)

    def project(self, fused: FusedLinear, x: Tensor, plus: Tensor | None = None) -> tuple[Tensor, Read]:
        """Base and adapters in one product of [x | low]."""
        mask = self.thinning.mask(x) if self.thinning and fused.rank else None
        joined = fused.joined(x, None if mask is None else x * mask)
        low = joined[:, fused.in_features :].contiguous() if fused.rank else None
        return _added(fused.product(joined), plus), Read(low, mask)

    def project_base(self, fused: FusedLinear, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """Zeros in place of low."""
        return _added(fused.without_adapter(x), plus)

    def project_back(self, fused: FusedLinear, read: Read, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """One product for both gradients, then what flows through A."""
        joined = gradient.to(fused.weight.dtype) @ fused.weight
        if not fused.rank:
            return joined, None
        inner, low = joined[:, : fused.in_features], joined[:, fused.in_features :].contiguous()
        if read.mask is None:
            return torch.addmm(inner, low, fused.down), low
        return inner + (low @ fused.down) * read.mask, low

    def adapter_gradients(
        self, fused: FusedLinear, x: Tensor, read: Read, gradient: Tensor, low: Tensor | None
    ) -> list[Tensor]:
        """Two products over the tokens."""
        if read.low is None or low is None:
            return []
        if read.mask is not None:
            x = x * read.mask
        down, up = low.T @ x, gradient.to(low.dtype).T @ read.low
        return fused.adapter_gradients(down, [up[outputs, ranks] for ranks, outputs in fused.parts])


class Native:
    """Native code, for float32 weights on a processor."""

    def normed(self, norm: Norm, x: Tensor) -> Tensor:
        """RMS norm in one pass."""
        return rows.normed(x, norm.weight, norm.eps)

    def normed_back(self, norm: Norm, x: Tensor, gradient: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Its gradient in one pass."""
        return rows.normed_back(x, norm.weight, norm.eps, gradient, residual)

    def gated(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up in one pass."""
        return rows.gated(gate_up)

    def gated_back(self, gate_up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Its gradient in one pass."""
        return rows.gated_back(gate_up, gradient)

    def project(self, fused: FusedLinear, x: Tensor, plus: Tensor | None = None) -> tuple[Tensor, Read]:
        """Base, adapters, and `plus` in one sum."""
        out, low = fused.summed(x, plus)
        return out, Read(low)

    def project_base(self, fused: FusedLinear, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """Base and `plus` in one sum."""
        return fused.summed(x, plus, adapted=False)[0]

    def project_back(self, fused: FusedLinear, read: Read, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Through base and A in one sum."""
        if not fused.rank:
            return sums.multiply(gradient, fused.factor(back=True)), None
        return sums.project(gradient, fused.factor(back=True), fused.path(back=True))

    def adapter_gradients(
        self, fused: FusedLinear, x: Tensor, read: Read, gradient: Tensor, low: Tensor | None
    ) -> list[Tensor]:
        """Products over the tokens, each layer's with its own outputs."""
        if read.low is None or low is None:
            return []
        ups = [(read.low[:, ranks], gradient[:, outputs]) for ranks, outputs in fused.parts]
        down, *found = sums.outer([(low, x), *ups])
        return fused.adapter_gradients(down, [up.T for up in found])


def operations_for(decoder: Decoder, thinning: Thinning | None) -> Operations:
    """Native code where it can be made and reads the weights."""
    return Native() if thinning is None and reads(decoder.head) else Torch(thinning)


def norm_gradient(norm: Norm, x: Tensor, inverse: Tensor, out: Tensor) -> Tensor:
    """d/dx of x * inverse(x) * weight, float32: g / rms - x (g . x) / (d rms^3) with g = out * weight."""
    scaled = out * norm.weight
    along = torch.linalg.vecdot(scaled, x)[..., None]
    return scaled.mul_(inverse).addcmul_(x, along.mul_(inverse.pow(3)), value=-1 / x.shape[-1])


def _added(x: Tensor, plus: Tensor | None) -> Tensor:
    return x if plus is None else plus + x
