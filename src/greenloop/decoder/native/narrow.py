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
    for bits in (4, 8):
        found = []
        for rows in weight.split(_ROWS):
            line = _line(rows.unflatten(1, (-1, GROUP)), bits)
            if line is None:
                break
            found.append(line)
        else:
            return _laid_out(bits, found)
    return None


def _line(groups: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Codes [N, in], scales and offsets [N, in / GROUP] of [N, in / GROUP, GROUP] weights, if they are such."""
    if bits == 4:
        least, greatest = groups.aminmax(dim=-1, keepdim=True)
        offsets, most = least, 15
        scales = (greatest - least) / most
    else:
        greatest, most = groups.abs().amax(dim=-1, keepdim=True), 127
        offsets, scales = torch.zeros_like(greatest), greatest / most
    # A file keeps scales in float16.
    scales = scales.half().float()
    codes = ((groups - offsets) / scales.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    if codes.abs().max() > most or not torch.equal(codes * scales + offsets, groups):
        return None
    return codes.flatten(1).to(torch.uint8 if bits == 4 else torch.int8), scales.squeeze(-1), offsets.squeeze(-1)


def _laid_out(bits: int, lines: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Narrow:
    codes, scales, offsets = (torch.cat(pieces) for pieces in zip(*lines, strict=True))
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    return Narrow(bits, *(blocks_of(one) for one in (codes, scales, offsets)))
