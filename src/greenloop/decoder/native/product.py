"""Products with few rows: x W^T for one float32 weight that is laid out once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from greenloop.decoder.native.layout import LANES
from greenloop.decoder.native.records import PRODUCT, record
from greenloop.decoder.native.team import available, run


def lays_out(weight: Tensor) -> bool:
    """Whether native code can read this [out, in] weight, laid out by `blocks_of`."""
    plain = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    return plain and weight.shape[0] % LANES == 0 and available()


class Product:
    """x W^T for one float32 weight."""

    def __init__(self, blocks: Tensor) -> None:
        """Ready to multiply.

        Args:
            blocks: [out / 16, in, 16], what `blocks_of` makes of a weight that `lays_out` accepts.
        """
        from greenloop.decoder.native.code import product

        self.blocks, self._function = blocks, product.address

    def __call__(self, x: Tensor) -> Tensor:
        """[N, in] float32 to [N, out]."""
        x = x.contiguous()
        count, width, _ = self.blocks.shape
        out = torch.empty(x.shape[0], count * LANES)
        taken = np.zeros(1, dtype=np.int64)
        fields = {
            "x": x.data_ptr(),
            "weight": self.blocks.data_ptr(),
            "out": out.data_ptr(),
            "rows": x.shape[0],
            "width": width,
            "blocks": count,
            "taken": taken.ctypes.data,
        }
        run(self._function, record(PRODUCT, fields).ctypes.data)
        return out
