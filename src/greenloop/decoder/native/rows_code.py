"""What training needs of many rows at once, compiled when this is first imported and kept after that."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from greenloop.decoder.native.layout import BIN, LANES, OUTPUTS, PANEL, ROWS, TILE
from greenloop.decoder.native.parts import (
    REORDERED,
    exp,
    floats,
    highest_of,
    integers,
    inverse_norm,
    meet,
    open_gate,
    portions,
    scale,
)
from greenloop.decoder.native.records import DRAW, OUTER, OUTERS, SUM, SWEEP
from greenloop.decoder.native.tile import (
    BYTES,
    LINE,
    TURN,
    WEIGHTS,
    add_atomically,
    call,
    copied,
    half_copied,
    half_turned,
    packed_tile,
    plain_tile,
    pointer,
    tile,
    turned,
    widened,
)

GROUP = 6
"""Rows of a sweep that a thread takes at a time."""
TILES = 4
"""Tiles of rows of which a thread makes the few outputs at a time."""
CHUNK = 128
"""Rows of a block of columns that are multiplied together: at most 24 KiB, which stay in a processor's first cache."""
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
def _add(one: Any, factors: Any, begin: int, width: int, block: int, row: int, rows: int, panel: int, on: bool) -> None:
    """Add a part of a product to a block of outputs of some rows.

    Args:
        one: the record.
        factors: of the product.
        begin: first input.
        width: inputs, at most a panel's.
        block: of outputs.
        row: the first one.
        rows: their count.
        panel: space for the weights.
        on: whether parts have been added before.
    """
    _lay_out(factors, block, min(OUTPUTS, one.outputs - block * OUTPUTS), begin, width, panel)
    for first in range(row, row + rows, ROWS):
        count, place = min(ROWS, row + rows - first), block * OUTPUTS
        x = factors.x.at + (first * factors.x.stride + begin) * BYTES
        out = one.out.at + (first * one.out.stride + place) * BYTES
        start, stride = (out, one.out.stride) if on else (0, one.start.stride)
        if one.start.at and not on:
            start = one.start.at + (first * stride + place) * BYTES
        plain_tile(count, x, factors.x.stride, panel, WEIGHTS, width, out, one.out.stride, panel, 0, start, stride, 0)


@njit
def _multiply(one: Any, panel: int, meetings: int, team: int) -> None:
    """This thread's share of the sum of products. All threads take the same panel of the inputs."""
    spans = integers(one.spans, 2 * ((one.outputs + OUTPUTS - 1) // OUTPUTS))
    shares = (one.rows + one.share - 1) // one.share
    items = (one.outputs + OUTPUTS - 1) // OUTPUTS * shares
    for begin in range(0, one.first.width, PANEL):
        if begin:
            meetings = meet(one, meetings + team)
        width = min(PANEL, one.first.width - begin)
        # Every thread has taken one item too many of each panel before.
        before = begin // PANEL * (items + team)
        item = add_atomically(one.taken, 1) - before
        while item < items:
            block, row = item // shares, item % shares * one.share
            rows = min(one.share, one.rows - row)
            _add(one, one.first, begin, width, block, row, rows, panel, begin > 0)
            if one.second.width and begin + width == one.first.width:
                low, high = spans[2 * block], spans[2 * block + 1]
                for rank in range(low, high, PANEL):
                    _add(one, one.second, rank, min(PANEL, high - rank), block, row, rows, panel, True)
            item = add_atomically(one.taken, 1) - before


@njit
def _reduce(one: Any) -> None:
    """This thread's share of the few outputs."""
    low, x = one.low, one.first.x
    reads = integers(low.reads, 2 * low.blocks)
    for first in portions(low.taken, one.rows, TILES * TILE):
        for block in range(low.blocks):
            begin, width = reads[2 * block], reads[2 * block + 1] - reads[2 * block]
            weight = low.weight + (block * low.width + begin) * LINE
            for row in range(first, min(first + TILES * TILE, one.rows), TILE):
                at = x.at + (row * x.stride + begin) * BYTES
                out = low.out.at + (row * low.out.stride + block * LANES) * BYTES
                count = min(TILE, one.rows - row)
                tile(count, at, x.stride, weight, LINE, width, out, low.out.stride, weight, 0, 0, 0, 0)


@njit
def _add_outer(one: Any, block: int, panel: int) -> None:
    """thin^T wide for a block of the columns of wide: the rows are the inputs of this product."""
    lanes, place = min(OUTPUTS, one.width - block * OUTPUTS), block * OUTPUTS * BYTES
    for begin in range(0, one.rows, CHUNK):
        width = min(CHUNK, one.rows - begin)
        weight, line = one.wide.at + begin * one.wide.stride * BYTES + place, one.wide.stride * BYTES
        if lanes < OUTPUTS:
            _copy_columns(weight, line, lanes, width, panel)
            weight, line = panel, WEIGHTS
        for column in range(0, one.count, ROWS):
            count, x = min(ROWS, one.count - column), one.thin.at + (begin * one.thin.stride + column) * BYTES
            out, stride = one.out.at + column * one.out.stride * BYTES + place, one.out.stride
            start = out if begin else 0
            packed_tile(count, x, one.thin.stride, weight, line, width, out, stride, weight, 0, start, stride, 0)


@njit
def _copy_columns(source: int, line: int, lanes: int, width: int, panel: int) -> None:
    """Copy the last columns to [width, OUTPUTS], filled up with zeros."""
    for k in range(width):
        found, target = floats(source + k * line, lanes), floats(panel + k * WEIGHTS, OUTPUTS)
        for lane in range(OUTPUTS):
            target[lane] = found[lane] if lane < lanes else np.float32(0.0)


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
    team, meetings = call(one.team_size), 0
    if one.low.blocks:
        _reduce(one)
        meetings = meet(one, team)
    _multiply(one, panel, meetings, team)


@cfunc("void(voidptr)", cache=True)
def multiply_outer(argument: Any) -> None:
    """One thread's part of what an OUTERS record describes."""
    one = carray(argument, 1, OUTERS)[0]
    panel = one.scratch + add_atomically(one.entered, 1) * CHUNK * WEIGHTS
    items = integers(one.items, 2 * one.item_count)
    # As many as the last one needs.
    products = carray(pointer(one.products), items[2 * one.item_count - 2] + 1, OUTER)
    for item in portions(one.taken, one.item_count, 1):
        _add_outer(products[items[2 * item]], items[2 * item + 1], panel)


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


@njit(fastmath=REORDERED)
def _weigh(x: Any, highest: Any, colder: Any, out: Any) -> Any:
    """e ** (x * colder - highest), 0 where that is below e ** -87, and their sum."""
    total = np.float32(0.0)
    for i in range(x.size):
        exponent = x[i] * colder - highest
        out[i] = np.float32(0.0) if exponent < np.float32(-87.0) else exp(exponent)
        total += out[i]
    return total


@njit
def _first_above(edges: Any, target: float) -> int:
    """The first of the rising values that is greater; the last one where none is."""
    low, high = 0, edges.size - 1
    while low < high:
        middle = (low + high) // 2
        if edges[middle] > target:
            high = middle
        else:
            low = middle + 1
    return low


@njit
def _pick(weights: Any, target: float) -> int:
    """The first index up to which the weights' sum is greater; the last one of some weight where it never is."""
    total, found = 0.0, 0
    for i in range(weights.size):
        total += weights[i]
        if weights[i] > 0:
            found = i
        if total > target:
            break
    return found


@njit
def _draw(one: Any, number: int, scratch: int) -> None:
    """The draws from one row: a bin by the bins' sums, then a token in it."""
    bins = (one.width + BIN - 1) // BIN
    x, weights = _row(one.x, number, one.width), floats(scratch, one.width)
    edges = carray(pointer(scratch + (one.scratch_size - 2 * bins) * BYTES), bins, np.float64)
    colder = np.float32(1.0 / one.temperature)
    highest, total = highest_of(x, x[0]) * colder, 0.0
    for place in range(bins):
        part = slice(place * BIN, min((place + 1) * BIN, one.width))
        total += _weigh(x[part], highest, colder, weights[part])
        edges[place] = total
    begins = integers(one.begins, one.rows + 1)
    count = begins[one.rows]
    uniform = carray(pointer(one.uniform), count, np.float64)
    tokens, logprobs = integers(one.tokens, count), floats(one.logprobs, count)
    for draw in range(begins[number], begins[number + 1]):
        target = uniform[draw] * total
        place = _first_above(edges, target)
        before = edges[place - 1] if place else 0.0
        token = place * BIN + _pick(weights[place * BIN : min((place + 1) * BIN, one.width)], target - before)
        tokens[draw] = token
        logprobs[draw] = math.log(weights[token]) - math.log(total)


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


@cfunc("void(voidptr)", cache=True)
def draw_tokens(argument: Any) -> None:
    """One thread's part of what a DRAW record describes."""
    one = carray(argument, 1, DRAW)[0]
    scratch = one.scratch + add_atomically(one.entered, 1) * one.scratch_size * BYTES
    for number in portions(one.taken, one.rows, 1):
        _draw(one, number, scratch)
