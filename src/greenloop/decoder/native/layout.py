"""How native code wants its weights: in blocks of 16 outputs that are read from the first byte to the last.

What the code and those who call it must agree on stands here, since the code takes seconds to compile.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

LANES = 16
"""Outputs of a block: one or several vectors on every processor."""
PANEL = 1024
"""Inputs of a block that are multiplied together: 64 KiB, which stay in a processor's second cache."""
QUERIES = 32
"""Tokens whose queries are taken together in training's attention."""
PHASES = 9
"""Of a layer in a decode step; the head has two more."""


def blocks_of(weight: Tensor) -> Tensor:
    """[out, in] laid out as [blocks, in, 16]; the last block is filled up with zeros."""
    missing = -weight.shape[0] % LANES
    padded = F.pad(weight, (0, 0, 0, missing)) if missing else weight
    blocks: Tensor = padded.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()
    return blocks
