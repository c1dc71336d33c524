"""Weights that were kept in few bits, read as such: a decode step of few rows lasts as long as reading its weights.

In: float32 weights as a quantised file gives them. Out: their codes, from which native code makes the same float32
values, bit for bit, while it multiplies. Nothing is rounded: weights that are not such are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from greenloop.decoder.native.layout import GROUP, blocks_of

_MOST = {4: 15, 8: 127}
"""The greatest code."""
_ROWS = 4096
"""Outputs that are looked at together."""


@dataclass(frozen=True, slots=True)
class Narrow:
    """code * scale + offset, a scale and an offset for `GROUP` inputs of an output."""

    bits: int
    """4 or 8."""
    codes: Tensor
    """uint8 [blocks, in / 2, OUTPUTS], the first of two inputs in the low half, or int8 [blocks, in, OUTPUTS]."""
    scales: Tensor
    """[blocks, in / GROUP, OUTPUTS]."""
    offsets: Tensor
    """[blocks, in / GROUP, OUTPUTS]."""

    def fields(self) -> dict[str, int]:
        """Of a NARROW record."""
        tensors = {"codes": self.codes, "scales": self.scales, "offsets": self.offsets}
        return {"bits": self.bits} | {name: tensor.data_ptr() for name, tensor in tensors.items()}

    @property
    def nbytes(self) -> int:
        """Of all three."""
        return self.codes.nbytes + self.scales.nbytes + self.offsets.nbytes


def narrow_of(weight: Tensor) -> Narrow | None:
    """The [out, in] float32 weight in 4 or 8 bits, if that is exactly what it is.

    4 bits are found where each group has its least and its greatest value at the codes 0 and 15, as llama.cpp's Q4_1
    has; 8 bits where the greatest magnitude has the code 127 and there is no offset, as in Q8_0. A code times a scale
    of float16 is exact, so that multiplying and adding in one instruction gives the same.
    """
    if weight.dtype != torch.float32 or weight.shape[1] % GROUP:
        return None
    for bits in _MOST:
        found = []
        for rows in weight.split(_ROWS):
            exact = _exact(rows, bits)
            if exact is None:
                break
            found.append(exact)
        else:
            return _laid_out(bits, found)
    return None


def nearest(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The [out, in] weight in few bits: codes [out, in / GROUP, GROUP], scales and offsets [out, in / GROUP, 1]."""
    groups = weight.unflatten(1, (-1, GROUP))
    if bits == 4:
        least, greatest = groups.aminmax(dim=-1, keepdim=True)
        offsets, scales = least, (greatest - least) / _MOST[bits]
    else:
        greatest = groups.abs().amax(dim=-1, keepdim=True)
        offsets, scales = torch.zeros_like(greatest), greatest / _MOST[bits]
    # A file keeps scales in float16.
    scales = scales.half().float()
    return ((groups - offsets) / scales.clamp_min(torch.finfo(torch.float32).tiny)).round_(), scales, offsets


def _exact(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Codes [N, in], scales and offsets [N, in / GROUP] of [N, in] weights, if they are such."""
    codes, scales, offsets = nearest(weight, bits)
    if codes.abs().max() > _MOST[bits] or not torch.equal((codes * scales + offsets).flatten(1), weight):
        return None
    return codes.flatten(1).to(torch.uint8 if bits == 4 else torch.int8), scales.squeeze(-1), offsets.squeeze(-1)


def _laid_out(bits: int, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Narrow:
    codes, scales, offsets = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    return Narrow(bits, *(blocks_of(one) for one in (codes, scales, offsets)))
