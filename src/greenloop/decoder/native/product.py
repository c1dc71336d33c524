"""Products: x W^T for one weight that is laid out once, in float32 whatever its type."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from greenloop.decoder.native.layout import LANES
from greenloop.decoder.native.records import PRODUCT, record
from greenloop.decoder.native.team import available, compiled, run


def lays_out(weight: Tensor) -> bool:
    """Whether native code can read this [out, in] weight, laid out by `blocks_of`."""
    plain = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    return plain and weight.shape[0] % LANES == 0 and available()


class Product:
    """x W^T for one weight."""

    def __init__(self, blocks: Tensor) -> None:
        """Ready to multiply.

        Args:
            blocks: [out / 16, in, 16], what `blocks_of` makes of a weight that `lays_out` accepts.
        """
        self.blocks, self._function = blocks, compiled().product.address

    def __call__(self, x: Tensor) -> Tensor:
        """[N, in] to [N, out] float32."""
        x = x.float().contiguous()
        count, width, _ = self.blocks.shape
        out = torch.empty(x.shape[0], count * LANES, dtype=torch.float32)
        taken = np.zeros(1, dtype=np.int64)
        fields = {
            "x": x.data_ptr(),
            "line": LANES * self.blocks.element_size(),
            "weight": self.blocks.data_ptr(),
            "out": out.data_ptr(),
            "rows": x.shape[0],
            "width": width,
            "blocks": count,
            "taken": taken.ctypes.data,
        }
        one = record(PRODUCT, fields)
        run(self._function, one.ctypes.data, torch.get_num_threads())
        return out
