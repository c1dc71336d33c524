"""Products: x W^T for one weight that is laid out once, in float32 whatever its type."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from greenloop.decoder.native.layout import OUTPUTS, ROWS
from greenloop.decoder.native.records import PRODUCT, record
from greenloop.decoder.native.team import available, compiled, meeting, run


def lays_out(weight: Tensor) -> bool:
    """Whether native code can read this [out, in] weight, laid out by `blocks_of`."""
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and available()


class Product:
    """x W^T for one weight."""

    def __init__(self, weight: Tensor, blocks: Tensor) -> None:
        """Ready to multiply.

        Args:
            weight: [out, in], one that `lays_out` accepts.
            blocks: what `blocks_of` makes of it.
        """
        self.blocks, self.outputs, self._function = blocks, weight.shape[0], compiled().product.address

    def __call__(self, x: Tensor) -> Tensor:
        """[N, in] to [N, out] float32."""
        x = x.float().contiguous()
        count, width, _ = self.blocks.shape
        out = torch.empty(x.shape[0], count * OUTPUTS, dtype=torch.float32)
        packed = torch.empty(-(-x.shape[0] // ROWS) * ROWS * width)
        state = np.zeros(3, dtype=np.int64)
        tiles, taken, met = (state[number:].ctypes.data for number in range(3))
        fields = {
            "x": x.data_ptr(),
            "packed": packed.data_ptr(),
            "line": OUTPUTS * self.blocks.element_size(),
            "weight": self.blocks.data_ptr(),
            "out": out.data_ptr(),
            "rows": x.shape[0],
            "width": width,
            "blocks": count,
            "tiles": tiles,
            "taken": taken,
            **meeting(met),
        }
        one = record(PRODUCT, fields)
        run(self._function, one.ctypes.data, torch.get_num_threads())
        return out[:, : self.outputs]
