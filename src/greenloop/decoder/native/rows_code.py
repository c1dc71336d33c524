"""What training needs of many rows at once, compiled when this is first imported and kept after that."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from greenloop.decoder.native.layout import OUTPUTS, PANEL, ROWS
from greenloop.decoder.native.parts import (
    INTEGER,
    REORDERED,
    add_packed,
    exp,
    floats,
    highest_of,
    inverse_norm,
    meet,
    open_gate,
    pack,
    portions,
    scale,
)
from greenloop.decoder.native.records import SUM, SWEEP
from greenloop.decoder.native.tile import (
    BYTES,
    TURN,
    WEIGHTS,
    add_atomically,
    call,
    copied,
    half_copied,
    half_turned,
    pointer,
    turned,
    widened,
)

GROUP = 6
"""Rows of a sweep that a thread takes at a time."""
TILES = 4
"""Tiles of rows that a thread packs at a time."""
HALF = 2
"""Bytes of a bfloat16."""


@njit
def _lay_out(factors: Any, block: int, lanes: int, begin: int, width: int, panel: int) -> None:
    """Copy a part of a weight, a block's outputs by `width` inputs, to [width, OUTPUTS], filled up with zeros."""
    size = HALF if factors.half else BYTES
    source = factors.weight + (block * OUTPUTS * factors.output + begin * factors.input) * size
    done = 0
    if lanes == OUTPUTS and factors.output == 1:
        for k in range(width):
            if factors.half:
                half_copied(source + k * factors.input * size, panel + k * WEIGHTS)
            else:
                copied(source + k * factors.input * size, panel + k * WEIGHTS)
        done = width
    elif lanes == OUTPUTS and factors.input == 1:
        done = width // TURN * TURN
        for k in range(0, done, TURN):
            for lane in range(0, OUTPUTS, TURN):
                at, target = source + (lane * factors.output + k) * size, panel + k * WEIGHTS + lane * BYTES
                if factors.half:
                    half_turned(at, factors.output, target, OUTPUTS)
                else:
                    turned(at, factors.output, target, OUTPUTS)
    for k in range(done, width):
        out = floats(panel + k * WEIGHTS, OUTPUTS)
        for lane in range(lanes, OUTPUTS):
            out[lane] = 0.0
        for lane in range(lanes):
            at = source + (lane * factors.output + k * factors.input) * size
            out[lane] = widened(carray(pointer(at), 1, np.uint16)[0]) if factors.half else floats(at, 1)[0]


@njit
def _place(one: Any, factors: Any, row: int, begin: int) -> int:
    """Where a tile of rows is packed: the inputs of a panel of all rows stand together."""
    whole = (one.rows + ROWS - 1) // ROWS * ROWS
    place: int = factors.packed + (begin * whole + row * min(PANEL, factors.width - begin)) * BYTES
    return place


@njit
def _pack(one: Any, factors: Any, taken: int) -> None:
    """Pack this thread's share of the rows of x."""
    x = factors.x
    for first in portions(taken, one.rows, TILES * ROWS):
        for row in range(first, min(first + TILES * ROWS, one.rows), ROWS):
            for begin in range(0, factors.width, PANEL):
                at, width = x.at + (row * x.stride + begin) * BYTES, min(PANEL, factors.width - begin)
                pack(at, x.stride, min(ROWS, one.rows - row), width, _place(one, factors, row, begin))


@njit
def _add(
    one: Any, target: Any, factors: Any, begin: int, block: int, row: int, rows: int, panel: int, begun: bool
) -> None:
    """Add a panel's part of a product to a block of outputs of some rows.

    Args:
        one: the record.
        target: where to.
        factors: of the product.
        begin: first input of the panel.
        block: of outputs.
        row: the first one.
        rows: their count.
        panel: space for the weights.
        begun: whether parts have been added before.
    """
    lanes, width = min(OUTPUTS, target.outputs - block * OUTPUTS), min(PANEL, factors.width - begin)
    _lay_out(factors, block, lanes, begin, width, panel)
    out, out_stride = target.out.at + (row * target.out.stride + block * OUTPUTS) * BYTES, target.out.stride
    start, start_stride = out, out_stride
    if not begun:
        start, start_stride = 0, target.start.stride
        if target.start.at:
            start = target.start.at + (row * start_stride + block * OUTPUTS) * BYTES
    packed = _place(one, factors, row, begin)
    add_packed(packed, width, rows, panel, WEIGHTS, width, out, out_stride, start, start_stride, 0, 0)


@njit
def _multiply(one: Any, target: Any, first: Any, second: Any, panel: int, meetings: int, team: int) -> int:
    """This thread's share of one product, or of the sum of two.

    All threads take the same panel of the inputs, whose packed rows then stay in the last cache.
    """
    shares = (one.rows + target.share - 1) // target.share
    items = (target.outputs + OUTPUTS - 1) // OUTPUTS * shares
    for begin in range(0, first.width, PANEL):
        # Every thread has taken one item too many of each panel before.
        before = begin // PANEL * (items + team)
        item = add_atomically(target.taken, 1) - before
        while item < items:
            block, row = item // shares, item % shares * target.share
            rows = min(target.share, one.rows - row)
            _add(one, target, first, begin, block, row, rows, panel, begin > 0)
            if second is not None and begin + PANEL >= first.width and second.width:
                _add(one, target, second, 0, block, row, rows, panel, True)
            item = add_atomically(target.taken, 1) - before
        meetings = meet(one, meetings + team)
    return meetings


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
    """One thread's part of what a SUM record describes."""
    one = carray(argument, 1, SUM)[0]
    panel = one.scratch + add_atomically(one.entered, 1) * PANEL * WEIGHTS
    team = call(one.team_size)
    _pack(one, one.first, one.packed)
    meetings = meet(one, team)
    if one.low.outputs:
        meetings = _multiply(one, one.low, one.down, None, panel, meetings, team)
        _pack(one, one.second, one.packed + INTEGER)
        meetings = meet(one, meetings + team)
    _multiply(one, one.whole, one.first, one.second, panel, meetings, team)


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
    highest = highest_of(x, x[0]) * colder
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
    """The rows that this thread takes of a SWEEP record."""
    for first in portions(one.taken, one.rows, GROUP):
        for offset in range(min(GROUP, one.rows - first)):
            yield first + offset


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
