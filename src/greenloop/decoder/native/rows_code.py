"""What training needs of many rows at once, compiled when this is first imported and kept after that."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from greenloop.decoder.native.layout import LANES, PANEL
from greenloop.decoder.native.parts import REORDERED, add_tiles, exp, floats, inverse_norm, open_gate, scale
from greenloop.decoder.native.records import SUM, SWEEP
from greenloop.decoder.native.tile import (
    BYTES,
    LINE,
    TURN,
    add_atomically,
    copied,
    half_copied,
    half_turned,
    pointer,
    turned,
    widened,
)

GROUP = 6
"""Rows of a sweep that a thread takes at a time."""
HALF = 2
"""Bytes of a bfloat16."""


@njit
def _lay_out(factors: Any, block: int, lanes: int, begin: int, width: int, panel: int) -> None:
    """Copy a part of a weight, 16 outputs by `width` inputs, to [width, 16] float32, filled up with zeros."""
    size = HALF if factors.half else BYTES
    source = factors.weight + (block * LANES * factors.output + begin * factors.input) * size
    done = 0
    if lanes == LANES and factors.output == 1:
        for k in range(width):
            if factors.half:
                half_copied(source + k * factors.input * size, panel + k * LINE)
            else:
                copied(source + k * factors.input * size, panel + k * LINE)
        done = width
    elif lanes == LANES and factors.input == 1:
        done = width // TURN * TURN
        for k in range(0, done, TURN):
            for lane in range(0, LANES, TURN):
                at, target = source + (lane * factors.output + k) * size, panel + k * LINE + lane * BYTES
                if factors.half:
                    half_turned(at, factors.output, target, LANES)
                else:
                    turned(at, factors.output, target, LANES)
    for k in range(done, width):
        out = floats(panel + k * LINE, LANES)
        for lane in range(lanes, LANES):
            out[lane] = 0.0
        for lane in range(lanes):
            at = source + (lane * factors.output + k * factors.input) * size
            out[lane] = widened(carray(pointer(at), 1, np.uint16)[0]) if factors.half else floats(at, 1)[0]


@njit
def _add(one: Any, factors: Any, block: int, row: int, rows: int, started: int, panel: int) -> int:
    """Add one product's part to a block of outputs of some rows; whether they hold anything afterwards."""
    lanes = min(LANES, one.outputs - block * LANES)
    stride, out_stride = factors.x.stride, one.out.stride
    out = one.out.at + (row * out_stride + block * LANES) * BYTES
    for begin in range(0, factors.width, PANEL):
        width = min(PANEL, factors.width - begin)
        _lay_out(factors, block, lanes, begin, width, panel)
        x = factors.x.at + (row * stride + begin) * BYTES
        start, start_stride = 0, 0
        if started:
            start, start_stride = out, out_stride
        elif one.start.at:
            start, start_stride = one.start.at + (row * one.start.stride + block * LANES) * BYTES, one.start.stride
        add_tiles(x, stride, rows, panel, LINE, width, out, out_stride, start, start_stride)
        started = 1
    return started


@njit
def _row(rows: Any, number: int, width: int) -> Any:
    return floats(rows.at + number * rows.stride * BYTES, width)


@njit(fastmath=REORDERED)
def _unscale(x: Any, inverse: Any, weight: Any, gradient: Any, plus: Any, out: Any) -> None:
    along = np.float32(0.0)
    for i in range(x.size):
        along += gradient[i] * weight[i] * x[i]
    along *= inverse * inverse * inverse / np.float32(x.size)
    for i in range(x.size):
        out[i] = plus[i] + gradient[i] * weight[i] * inverse - x[i] * along


@njit(error_model="numpy", fastmath=REORDERED)
def _close_gate(x: Any, gradient: Any, out: Any, again: Any) -> None:
    width, whole = again.size, np.float32(1.0)
    for i in range(width):
        gate, up = x[i], x[width + i]
        open_share = whole / (whole + exp(-gate))
        opened = gate * open_share
        again[i] = opened * up
        out[width + i] = gradient[i] * opened
        out[i] = gradient[i] * up * open_share * (whole + gate - opened)


@njit(fastmath=REORDERED)
def _highest(x: Any) -> Any:
    highest = x[0]
    for i in range(x.size):
        highest = max(highest, x[i])
    return highest


@njit(fastmath=REORDERED)
def _spread(x: Any, highest: Any, colder: Any) -> Any:
    """x becomes e ** (x * colder - highest); their sum, and their sum with those exponents as weights."""
    total, moment = np.float32(0.0), np.float32(0.0)
    for i in range(x.size):
        exponent = x[i] * colder - highest
        power = exp(exponent)
        total += power
        moment += power * exponent
        x[i] = power
    return total, moment


@njit(fastmath=REORDERED)
def _shrink(x: Any, factor: Any) -> None:
    for i in range(x.size):
        x[i] *= factor


@cfunc("void(voidptr)", cache=True)
def add_products(argument: Any) -> None:
    """One thread's part of the sum that a SUM record describes."""
    one = carray(argument, 1, SUM)[0]
    panel = one.scratch + add_atomically(one.entered, 1) * PANEL * LINE
    blocks = (one.outputs + LANES - 1) // LANES
    shares = (one.rows + one.share - 1) // one.share
    item = add_atomically(one.taken, 1)
    while item < blocks * shares:
        block, row = item // shares, item % shares * one.share
        rows = min(one.share, one.rows - row)
        started = _add(one, one.first, block, row, rows, 0, panel)
        _add(one, one.second, block, row, rows, started, panel)
        item = add_atomically(one.taken, 1)


@njit
def _normalise(one: Any, number: int) -> None:
    x = _row(one.x, number, one.width)
    scale(x, inverse_norm(x, one.eps), floats(one.weight, one.width), _row(one.out, number, one.width))


@njit
def _normalise_back(one: Any, number: int) -> None:
    weight, x = floats(one.weight, one.width), _row(one.x, number, one.width)
    inverse = inverse_norm(x, one.eps)
    scale(x, inverse, weight, _row(one.again, number, one.width))
    gradient, plus = _row(one.gradient, number, one.width), _row(one.plus, number, one.width)
    _unscale(x, inverse, weight, gradient, plus, _row(one.out, number, one.width))


@njit
def _gate(one: Any, number: int) -> None:
    open_gate(_row(one.x, number, 2 * one.width), _row(one.out, number, one.width))


@njit
def _gate_back(one: Any, number: int) -> None:
    x, out = _row(one.x, number, 2 * one.width), _row(one.out, number, 2 * one.width)
    _close_gate(x, _row(one.gradient, number, one.width), out, _row(one.again, number, one.width))


@njit
def _judge(one: Any, number: int) -> None:
    x, label = _row(one.x, number, one.width), carray(pointer(one.labels), one.rows, np.int64)[number]
    colder = np.float32(1.0 / one.temperature)
    highest = _highest(x) * colder
    chosen = x[label] * colder - highest
    total, moment = _spread(x, highest, colder)
    floats(one.logprob, one.rows)[number] = chosen - math.log(total)
    floats(one.entropy, one.rows)[number] = math.log(total) - moment / total
    if one.slope:
        share = np.float32(1.0 / total)
        at_label = (np.float32(1.0) - x[label] * share) * colder
        _shrink(x, -share * colder)
        x[label] = at_label


@njit
def _taken(one: Any) -> Any:
    """The rows that this thread takes of a SWEEP record.

    What is done with a row cannot be handed to a common loop instead: Numba does not keep code that is handed
    functions.
    """
    first = add_atomically(one.taken, GROUP)
    while first < one.rows:
        for offset in range(min(GROUP, one.rows - first)):
            yield first + offset
        first = add_atomically(one.taken, GROUP)


@cfunc("void(voidptr)", cache=True)
def normalise(argument: Any) -> None:
    """RMS norm of x."""
    one = carray(argument, 1, SWEEP)[0]
    for number in _taken(one):
        _normalise(one, number)


@cfunc("void(voidptr)", cache=True)
def normalise_back(argument: Any) -> None:
    """`plus` with the gradient of x, and the norm of x again.

    g / rms - x (g . x) / (d rms^3) with g = gradient * weight.
    """
    one = carray(argument, 1, SWEEP)[0]
    for number in _taken(one):
        _normalise_back(one, number)


@cfunc("void(voidptr)", cache=True)
def gate(argument: Any) -> None:
    """silu(first half of x) * second half."""
    one = carray(argument, 1, SWEEP)[0]
    for number in _taken(one):
        _gate(one, number)


@cfunc("void(voidptr)", cache=True)
def gate_back(argument: Any) -> None:
    """The gradient of x from that of the gated values; the gated values again."""
    one = carray(argument, 1, SWEEP)[0]
    for number in _taken(one):
        _gate_back(one, number)


@cfunc("void(voidptr)", cache=True)
def judge_labels(argument: Any) -> None:
    """Log-prob of each row's label and entropy of its distribution, from logits x.

    With `slope`, x becomes d log-prob / d logits: (1 at the label - p) / temperature.
    """
    one = carray(argument, 1, SWEEP)[0]
    for number in _taken(one):
        _judge(one, number)
