"""What the passes of native code have in common, for Numba to compile into each."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, njit

from greenloop.decoder.native.instructions import BYTES, HALF
from greenloop.decoder.native.layout import (
    BESIDE,
    FLAT,
    GROUP,
    GROUP_LINES,
    LANES,
    LEAST,
    MOST_SHORT,
    ROWS,
    TILE,
)
from greenloop.decoder.native.rounded_tile import round_group
from greenloop.decoder.native.tile import (
    LINE,
    QUARTET,
    WEIGHTS,
    add_atomically,
    call,
    flat_short_tile,
    flat_tile,
    half_tile,
    interleaved,
    larger,
    load_atomically,
    packed_tile,
    pointer,
    power_of_two,
    short_tile,
    tile,
    whole_tile,
)

INTEGER = 8
"""Bytes."""
PATIENCE = 2000
"""Looks at the others before a waiting thread offers its core to them."""
REORDERED = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be taken in any order, as vectors need; NaN and infinity stay what they are."""


@njit
def floats(address: int, count: int) -> Any:
    """The float32 values at an address."""
    return carray(pointer(address), count, np.float32)


@njit
def integers(address: int, count: int) -> Any:
    """The int64 values at an address."""
    return carray(pointer(address), count, np.int64)


@njit
def copy(source: int, target: int, count: int) -> None:
    """So many float32 values from an address to another."""
    values, out = floats(source, count), floats(target, count)
    for i in range(count):
        out[i] = values[i]


@njit
def round_groups(source: int, target: int, groups: int) -> None:
    """`round_group` for so many that stand side by side."""
    for group in range(groups):
        round_group(source + group * GROUP * BYTES, target + group * GROUP_LINES * BYTES)


@njit(error_model="numpy", fastmath=REORDERED)
def round_spread(values: Any, codes: int, apart: int, step: int, scale: int) -> None:
    """Round a token's key or value to integers and one scale, which is NaN or infinite where a value is.

    Args:
        values: [D] float32.
        codes: address of the first int16.
        apart: codes from one of 16 to the next.
        step: codes from a value to the next of those 16.
        scale: address.
    """
    most, strange = np.float32(0.0), np.float32(0.0)
    for i in range(values.size):
        most = larger(abs(values[i]), most)
        strange += values[i] * np.float32(0.0)
    inverse = np.float32(MOST_SHORT) / most if most > np.float32(LEAST) else np.float32(0.0)
    for block in range(values.size // LANES):
        out = carray(pointer(codes + block * apart * HALF), (LANES - 1) * step + 1, np.int16)
        for i in range(LANES):
            out[i * step] = np.int16(np.rint(values[block * LANES + i] * inverse))
    floats(scale, 1)[0] = most * np.float32(1.0 / MOST_SHORT) + strange


@njit(fastmath=REORDERED)
def weigh(x: Any, factors: Any) -> None:
    """x times factors, in place."""
    for i in range(x.size):
        x[i] *= factors[i]


@njit
def portions(taken: int, count: int, size: int) -> Any:
    """Where the portions begin that this thread takes of `count` things, from a count that all threads share.

    What is done with a portion cannot be handed to this loop instead: Numba does not keep code that is handed
    functions.
    """
    first = add_atomically(taken, size)
    while first < count:
        yield first
        first = add_atomically(taken, size)


@njit
def meet(one: Any, expected: int) -> int:
    """Wait until all threads have come here; `expected` is how often threads have met then, all in all."""
    add_atomically(one.met, 1)
    looks = 0
    while load_atomically(one.met) < expected:
        looks += 1
        if looks % PATIENCE == 0:
            call(one.give_way)
    return expected


@njit
def pack(x: int, stride: int, rows: int, width: int, packed: int) -> None:
    """Lay at most ROWS rows [rows, width] out as [width, ROWS], whose columns beyond the rows stay what they are."""
    done = 0
    if rows == ROWS:
        done = width // QUARTET * QUARTET
        for k in range(0, done, QUARTET):
            for row in range(0, ROWS, QUARTET):
                interleaved(x + (row * stride + k) * BYTES, stride, packed + (k * ROWS + row) * BYTES, ROWS)
    for row in range(rows):
        source, target = floats(x + row * stride * BYTES, width), floats(packed + row * BYTES, width * ROWS)
        for k in range(done, width):
            target[k * ROWS] = source[k]


@njit
def add_packed(
    packed: int,
    pitch: int,
    rows: int,
    block: int,
    line: int,
    width: int,
    out: int,
    out_stride: int,
    start: int,
    start_stride: int,
    following: int,
    pace: int,
) -> None:
    """The products of packed rows with one block of a weight, added to what stands at `start` if that is not 0.

    Args:
        packed: the first input of tiles of ROWS rows.
        pitch: inputs from a tile to the next.
        rows: of all tiles.
        block: [width, OUTPUTS] weights, float32 or bfloat16.
        line: bytes from an input's weights to the next input's.
        width: inputs.
        out: the first row's outputs.
        out_stride: values from a row's outputs to the next row's.
        start: the first row's values to which its products are added.
        start_stride: values from a row's to the next row's.
        following: what is fetched meanwhile; 0 for nothing.
        pace: bytes of that an input.
    """
    step = pace // ((rows + ROWS - 1) // ROWS)
    for row in range(0, rows, ROWS):
        count, at, target = min(ROWS, rows - row), packed + row * pitch * BYTES, out + row * out_stride * BYTES
        begin = start + row * start_stride * BYTES if start else 0
        ahead = following + row // ROWS * width * step if following else block
        if not following and line == WEIGHTS:
            packed_tile(count, at, ROWS, block, line, width, target, out_stride, block, 0, begin, start_stride, 0)
        elif line == WEIGHTS:
            whole_tile(count, at, ROWS, block, line, width, target, out_stride, ahead, step, begin, start_stride, 0)
        else:
            half_tile(count, at, ROWS, block, line, width, target, out_stride, ahead, step, begin, start_stride, 0)


@njit(fastmath=REORDERED)
def exp(x: Any) -> Any:
    """e ** x in float32 without a call, so that loops become vectors; NaN stays NaN.

    Cephes' `expf` (Moshier, 1989): 2 ** n e ** r with |r| <= log(2) / 2, e ** r by its polynomial of degree 7. Relative
    error below 2e-7; below e ** -87 it is e ** -87, above e ** 88 e ** 88.
    """
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    x = np.float32(88.0) if x > np.float32(88.0) else x
    exponent = np.int32(x * np.float32(1.44269504088896341) + np.float32(127.5))
    n = np.float32(exponent - np.int32(127))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + np.float32(1.0)) * power_of_two(exponent)


@njit
def add_tiles(
    x: int,
    x_stride: int,
    rows: int,
    first: int,
    apart: int,
    blocks: int,
    line: int,
    width: int,
    out: int,
    out_stride: int,
    adding: bool,
    short: Any = None,
) -> None:
    """The products of all rows with blocks, whose outputs stand side by side.

    Args:
        x: the first row.
        x_stride: values from a row to the next.
        rows: their count.
        first: of the blocks [width, 16].
        apart: bytes from a block to the next.
        blocks: their count.
        line: bytes from an input of a block to the next.
        width: inputs.
        out: the first row's outputs.
        out_stride: values from a row's outputs to the next row's.
        adding: to what stands there.
        short: None for float32 blocks; True for blocks of 16-bit integers, which is compiled apart.
    """
    block = 0
    while block < blocks:
        together = block + BESIDE <= blocks
        most, begin = FLAT if together else TILE, first + block * apart
        for row in range(0, rows, most):
            count, at = min(most, rows - row), x + row * x_stride * BYTES
            target = out + row * out_stride * BYTES + block * LINE
            start = target if adding else 0
            if short is None:
                if together:
                    flat_tile(
                        count, at, x_stride, begin, line, width, target, out_stride, begin, 0, start, out_stride, apart
                    )
                else:
                    tile(count, at, x_stride, begin, line, width, target, out_stride, begin, 0, start, out_stride, 0)
            elif together:
                flat_short_tile(
                    count, at, x_stride, begin, line, width, target, out_stride, begin, 0, start, out_stride, apart
                )
            else:
                short_tile(count, at, x_stride, begin, line, width, target, out_stride, begin, 0, start, out_stride, 0)
        block += BESIDE if together else 1


@njit(error_model="numpy", fastmath=REORDERED)
def inverse_norm(x: Any, eps: float) -> Any:
    """1 / root mean square."""
    squares = np.float32(0.0)
    for i in range(x.size):
        squares += x[i] * x[i]
    return np.float32(1.0 / math.sqrt(squares / x.size + eps))


@njit(fastmath=REORDERED)
def scale(x: Any, inverse: Any, weight: Any, out: Any) -> None:
    """The norm of x."""
    for i in range(x.size):
        out[i] = x[i] * inverse * weight[i]


@njit(error_model="numpy", fastmath=REORDERED)
def open_gate(x: Any, out: Any) -> None:
    """silu(first half of x) * second half."""
    width = out.size
    for i in range(width):
        out[i] = x[i] / (np.float32(1.0) + exp(-x[i])) * x[width + i]


@njit
def highest_of(x: Any, least: Any) -> Any:
    """The largest value, or `least`; where there is NaN any of them."""
    highest = least
    for i in range(x.size):
        highest = larger(x[i], highest)
    return highest


@njit(error_model="numpy", fastmath=REORDERED)
def soften(first: Any, second: Any) -> None:
    """Softmax over both arrays together, in place."""
    highest = highest_of(second, highest_of(first, first[0]))
    total = np.float32(0.0)
    for i in range(first.size):
        first[i] = exp(first[i] - highest)
        total += first[i]
    for i in range(second.size):
        second[i] = exp(second[i] - highest)
        total += second[i]
    share = np.float32(1.0) / total
    for i in range(first.size):
        first[i] *= share
    for i in range(second.size):
        second[i] *= share


@njit(fastmath=REORDERED)
def turn(source: Any, cos: Any, sin: Any, way: Any, factor: Any, target: Any) -> None:
    """A head at its position (`way` 1), or back from there (-1), times `factor`."""
    half = cos.size
    for i in range(half):
        left, right, height = source[i], source[half + i], sin[i] * way
        target[i] = (left * cos[i] - right * height) * factor
        target[half + i] = (right * cos[i] + left * height) * factor
