"""How native code wants its weights: in blocks of outputs that are read from the first byte to the last.

What the code and those who call it must agree on stands here, since the code takes seconds to compile.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

_WIDE = (os.environ.get("GREENLOOP_BLOCKS_FOR") or torch.backends.cpu.get_cpu_capability()).startswith("AVX512")
"""Whether blocks are those of a processor with AVX-512; the variable is for testing the other kind."""
LANES = 16
"""Keys or values of a block of attention: one or several vectors on every processor."""
TILE = 12 if _WIDE else 6
"""Rows of attention whose sums over a block are in registers together: in 12 of AVX2's 16 vectors, of AVX-512's 32."""
FLAT, BESIDE = (6, 4) if _WIDE else (3, 2)
"""The same where so many blocks are taken together: the few query heads of a KV head have sums enough then."""
ROWS, OUTPUTS = (8, 48) if _WIDE else (4, 24)
"""The same for products with weights, and outputs of a weight's block: three vectors each."""
FETCHES = 4 if _WIDE else 2
"""Lines of what is needed next that are fetched during four inputs."""
PANEL = 3072 if _WIDE else 1024
"""Inputs of a block that are multiplied together: at most 576 KiB (96 on AVX2), which stay in a processor's second
cache."""
SHEET = 128 if _WIDE else 256
"""Inputs of a block that are made float32 together: at most 24 KiB, which stay in its first cache."""
FEW = 16 if _WIDE else 8
"""Rows for which weights are read in few bits; with more the products last longer than reading float32 does."""
GROUP = 32
"""Inputs of an output whose weights have one scale where they are kept in few bits, or rounded."""
GROUP_LINES = GROUP // 2 + 1
"""Of a rounded group, four bytes an output: pairs of codes, then the scale."""
MOST_CODE = 8191
"""The greatest code of a rounded value: a group's products of two such add up to less than 2 ** 31."""
MOST_SHORT = 32767
"""The greatest code of a key or a value of attention, which is float32 again before anything is added up."""
LEAST = 1e-30
"""Values without a greater one are rounded to zeros: the reciprocal of less would not be finite."""
STRIP = 128
"""Rows of a block of columns that are multiplied together: at most 24 KiB, which stay in a processor's first cache."""
BIN = 256
"""Tokens whose weights are added up before a draw looks among them."""
QUERIES = 32
"""Tokens whose queries are taken together in training's attention."""
PHASES = 9
"""Of a layer in a decode step; the head has two more."""


def rounded_size(inputs: int) -> int:
    """Of four bytes each: what so many inputs, whole groups, take when they are rounded."""
    return inputs // GROUP * GROUP_LINES


def whole_blocks(outputs: int, size: int = OUTPUTS) -> int:
    """The next multiple of a block's outputs."""
    return -(-outputs // size) * size


def blocks_of(weight: Tensor, size: int = OUTPUTS) -> Tensor:
    """[out, in] laid out as [blocks, in, size]; the last block is filled up with zeros."""
    missing = whole_blocks(weight.shape[0], size) - weight.shape[0]
    padded = F.pad(weight, (0, 0, 0, missing)) if missing else weight
    blocks: Tensor = padded.unflatten(0, (-1, size)).transpose(1, 2).contiguous()
    return blocks
