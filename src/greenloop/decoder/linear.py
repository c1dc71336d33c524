"""Several linear layers that read the same input, as one matrix, with their LoRA paths in it.

In: the linear layers of a transformers model, plain or wrapped by PEFT. The low-rank path stays separate (merging LoRA
into bfloat16 weights rounds the update away), but every B stands as further columns beside the base: with
low = x A^T, one product [x | low] [W | s B]^T gives the whole output, and in training its transpose gives both
gradients. The adapter is stored and stepped in float32 by PEFT; here is its copy in the base's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenloop.decoder.kernels import packed
from greenloop.decoder.native import Narrow, Product, Rounded, blocks_of, lays_out, narrow_of, sums


class FusedLinear:
    """One product for several layers. The layers' own weights become views of it, so the memory is paid once."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.layers = layers
        bases = [base_of(layer) for layer in layers]
        self.widths = [base.weight.shape[0] for base in bases]
        self.ranks = [_rank(layer) for layer in layers]
        self.rank = sum(self.ranks)
        first = bases[0].weight
        self.in_features = first.shape[1]
        self.weight = first.new_zeros(sum(self.widths), self.in_features + self.rank)
        """[out, in + rank]: the base, then every B, scaled, block by block."""
        self.down = first.new_zeros(self.rank, self.in_features)
        """[rank, in]: every A."""
        self.bias = _fused_bias(bases)
        self._packed: Callable[[Tensor], Tensor] | None = None
        self.blocks: Tensor | None = None
        """[blocks, in + rank, OUTPUTS]: `weight` as native code reads it, if it is laid out so."""
        self.up_blocks: Tensor | None = None
        """[blocks, rank, OUTPUTS]: every B as native code reads it beside a rounded base, if it is laid out so."""
        self.rounds = False
        """Whether native code multiplies with the base in rounded form (`native.Rounded`)."""
        self._rounded: dict[bool, Rounded | None] = {}
        self._paths: dict[bool, sums.LowRank] = {}
        row = 0
        for base, width in zip(bases, self.widths, strict=True):
            view = self.weight[row : row + width, : self.in_features]
            base.weight.data = view.copy_(base.weight)
            row += width
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the adapter's present values."""
        self.unpack()
        self._paths.clear()
        for layer, rank, out in self._blocks():
            a, b, scale = lora_of(layer)
            self.down[rank].copy_(a)
            self.weight[out, self.in_features :][:, rank].copy_(b * scale)

    def pack(self, rows: int, *, native: bool) -> None:
        """Lay the present weight out for calls with about `rows` rows, until the next `refresh` or `unpack`.

        Args:
            rows: of the calls.
            native: `native.Step` will read the weight.
        """
        self.unpack()
        if self.rounded() is not None:
            self.up_blocks = blocks_of(self.up) if native else None
            return
        whole = self.weight.dtype == torch.float32
        if lays_out(self.weight) and (native or whole):
            self.blocks = blocks_of(self.weight)
        if self.blocks is None:
            self._packed = packed(self.weight, rows)
        elif whole:
            self._packed = Product(self.weight, self.blocks)

    def unpack(self) -> None:
        """Give up what `pack` made: a second copy of the weight."""
        self._packed = self.blocks = self.up_blocks = None

    def __call__(self, x: Tensor) -> Tensor:
        """[N, in] to [N, sum of the layers' outputs]."""
        if self.rounded() is not None:
            return self.summed(x)[0]
        joined = self.joined(x)
        if self._packed is None:
            return self.product(joined)
        out = self._packed(joined)
        return out if self.bias is None else out.add_(self.bias)

    def joined(self, x: Tensor, dropped: Tensor | None = None) -> Tensor:
        """[x | x A^T], [N, in + rank].

        Args:
            x: [N, in].
            dropped: what the adapter reads instead of `x`, if its input was thinned out.
        """
        return torch.cat([x, F.linear(x if dropped is None else dropped, self.down)], dim=1) if self.rank else x

    def without_adapter(self, x: Tensor) -> Tensor:
        """[N, in] to [N, out] of the base layers alone."""
        return self.product(F.pad(x, (0, self.rank)))

    def product(self, joined: Tensor) -> Tensor:
        """[N, in + rank] of `joined` to the outputs [N, out]."""
        return F.linear(joined, self.weight, self.bias)

    @cached_property
    def narrow(self) -> Narrow | None:
        """`base` in few bits, if it is such and not rounded; it does not change."""
        return narrow_of(self.base) if self.rounded() is None else None

    def rounded(self, *, back: bool = False) -> Rounded | None:
        """`base`, or its transpose for the way back, in rounded form, if it is to be and can be; it does not change."""
        if not self.rounds:
            return None
        if back not in self._rounded:
            self._rounded[back] = Rounded.of(self.base.T if back else self.base)
        return self._rounded[back]

    def factor(self, *, back: bool = False) -> Tensor | Rounded:
        """`base`, or its transpose for the way back, as `sums` multiplies with it."""
        whole = self.base.T if back else self.base
        return self.rounded(back=back) or whole

    @property
    def base(self) -> Tensor:
        """[out, in], a view."""
        base: Tensor = self.weight[:, : self.in_features]
        return base

    @property
    def up(self) -> Tensor:
        """[out, rank]: every B, scaled, a view."""
        up: Tensor = self.weight[:, self.in_features :]
        return up

    def summed(self, x: Tensor, plus: Tensor | None = None, *, adapted: bool = True) -> tuple[Tensor, Tensor | None]:
        """The outputs [N, out] added to `plus`, and x A^T [N, rank], by native code.

        Args:
            x: [N, in].
            plus: [N, out].
            adapted: with the adapters; without them there is no x A^T.
        """
        low, base = None, self.factor()
        if adapted and self.rank:
            out, low = sums.project(x, base, self.path(), plus)
        else:
            out = sums.multiply(x, base, plus)
        return out if self.bias is None else out.add_(self.bias), low

    def path(self, *, back: bool = False) -> sums.LowRank:
        """The adapters as native code reads them, from the inputs to the outputs or back, until the next `refresh`."""
        if back not in self._paths:
            every = [(slice(0, self.rank), slice(0, self.in_features))]
            self._paths[back] = (
                sums.LowRank.of(self.up.T, self.down.T, self.parts, every)
                if back
                else sums.LowRank.of(self.down, self.up, every, self.parts)
            )
        return self._paths[back]

    def adapter(self) -> list[nn.Parameter]:
        """The float32 A and B of each adapted layer, in turn."""
        return [weight for layer, _, _ in self._blocks() for weight in lora_of(layer)[:2]]

    def adapter_gradients(self, down: Tensor, ups: Sequence[Tensor]) -> list[Tensor]:
        """Gradients for `adapter()`.

        Args:
            down: [rank, in] gradient of `down`.
            ups: [out, r] of each adapted layer's part of `up`.
        """
        gradients = []
        for (layer, rank, _), up in zip(self._blocks(), ups, strict=True):
            a, b, scale = lora_of(layer)
            gradients += [down[rank].to(a.dtype), up.to(b.dtype) * scale]
        return gradients

    @property
    def parts(self) -> list[tuple[slice, slice]]:
        """Each adapted layer's ranks and its outputs."""
        return [(rank, out) for _, rank, out in self._blocks()]

    def _blocks(self) -> list[tuple[nn.Module, slice, slice]]:
        """Each adapted layer with its rows of `down` and its rows of `weight`."""
        blocks, low, row = [], 0, 0
        for layer, width, rank in zip(self.layers, self.widths, self.ranks, strict=True):
            if rank:
                blocks.append((layer, slice(low, low + rank), slice(row, row + width)))
            low, row = low + rank, row + width
        return blocks


def base_of(layer: Any) -> Any:
    """The frozen linear under a LoRA layer, or the layer itself."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def lora_of(layer: Any) -> tuple[nn.Parameter, nn.Parameter, float]:
    """A [r, in], B [out, r] and the scale of the one active adapter."""
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])


def is_plain(layer: Any) -> bool:
    """Whether `FusedLinear` computes what the layer computes: a linear layer with at most one ordinary LoRA adapter."""
    adapters = getattr(layer, "lora_A", None)
    if not adapters:
        return isinstance(layer, nn.Linear)
    names = layer.active_adapters
    return (
        isinstance(base_of(layer), nn.Linear)
        and list(adapters) == list(names)
        and len(names) == 1
        and not layer.use_dora[names[0]]
        and not layer.lora_bias[names[0]]
    )


def _rank(layer: Any) -> int:
    return lora_of(layer)[0].shape[0] if getattr(layer, "lora_A", None) else 0


def _fused_bias(bases: list[Any]) -> Tensor | None:
    if all(base.bias is None for base in bases):
        return None
    weight = bases[0].weight
    return torch.cat([weight.new_zeros(b.weight.shape[0]) if b.bias is None else b.bias.data for b in bases])
