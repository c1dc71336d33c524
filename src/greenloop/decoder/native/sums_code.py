"""Products of many rows, compiled when this is first imported and kept after that."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from greenloop.decoder.native.instructions import BYTES, HALF
from greenloop.decoder.native.layout import GROUP, GROUP_LINES, LANES, OUTPUTS, PANEL, ROWS, STRIP, TILE
from greenloop.decoder.native.parts import add_tiles, copy, floats, integers, meet, portions, round_groups
from greenloop.decoder.native.records import OUTER, OUTERS, RESTORING, ROUNDING, SUM
from greenloop.decoder.native.rounded_tile import rounded_tile
from greenloop.decoder.native.tile import (
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
    turned,
    widened,
)

TILES = 4
"""Tiles of rows of which a thread makes the few outputs at a time."""


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
def _add_rounded(one: Any, factors: Any, begin: int, width: int, block: int, row: int, rows: int, on: bool) -> None:
    """`_add` for a rounded weight, which is read as it lies."""
    group, size = begin // GROUP, GROUP_LINES * BYTES
    weight = factors.weight + (block * (factors.width // GROUP) + group) * GROUP_LINES * WEIGHTS
    for first in range(row, row + rows, ROWS):
        count, place = min(ROWS, row + rows - first), block * OUTPUTS
        x = one.rounding.out + first * one.rounding.pitch + group * size
        stride = one.out.stride * BYTES
        out = one.out.at + first * stride + place * BYTES
        start, step = (out, stride) if on else (0, one.start.stride * BYTES)
        if one.start.at and not on:
            start = one.start.at + first * step + place * BYTES
        rounded_tile(count, x, one.rounding.pitch, weight, width // GROUP, out, stride, weight, 0, start, step)


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
    if factors.rounded:
        _add_rounded(one, factors, begin, width, block, row, rows, on)
        return
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
def _round(one: Any) -> None:
    """This thread's share of the rows of a ROUNDING record."""
    for first in portions(one.taken, one.rows, ROWS):
        for row in range(first, min(first + ROWS, one.rows)):
            source, target = one.x.at + row * one.x.stride * BYTES, one.out + row * one.pitch
            round_groups(source, target, one.groups)


@njit
def _reduce(one: Any) -> None:
    """This thread's share of the few outputs."""
    low, x = one.low, one.first.x
    reads = integers(low.reads, 2 * low.blocks)
    for first in portions(low.taken, one.rows, TILES * TILE):
        for block in range(low.blocks):
            begin, width = reads[2 * block], reads[2 * block + 1] - reads[2 * block]
            weight = low.weight + (block * low.width + begin) * LINE
            at = x.at + (first * x.stride + begin) * BYTES
            out = low.out.at + (first * low.out.stride + block * LANES) * BYTES
            rows = min(TILES * TILE, one.rows - first)
            add_tiles(at, x.stride, rows, weight, 0, 1, LINE, width, out, low.out.stride, False)


@njit
def _add_outer(one: Any, block: int, panel: int) -> None:
    """thin^T wide for a block of the columns of wide: the rows are the inputs of this product."""
    factors = one.factors
    lanes, place = min(OUTPUTS, one.outputs - block * OUTPUTS), block * OUTPUTS * BYTES
    for begin in range(0, factors.width, STRIP):
        width = min(STRIP, factors.width - begin)
        weight, line = factors.weight + begin * factors.input * BYTES + place, factors.input * BYTES
        if lanes < OUTPUTS:
            _lay_out(factors, block, lanes, begin, width, panel)
            weight, line = panel, WEIGHTS
        for column in range(0, one.count, ROWS):
            count, x = min(ROWS, one.count - column), factors.x.at + (begin * factors.x.stride + column) * BYTES
            out, stride = one.out.at + column * one.out.stride * BYTES + place, one.out.stride
            start = out if begin else 0
            packed_tile(count, x, factors.x.stride, weight, line, width, out, stride, weight, 0, start, stride, 0)


@njit
def _restore(source: int, groups: int, target: int) -> None:
    """The float32 values of rounded groups."""
    for group in range(groups):
        at = source + group * GROUP_LINES * BYTES
        codes, scale = carray(pointer(at), GROUP, np.int16), floats(at + GROUP * HALF, 1)[0]
        out = floats(target + group * GROUP * BYTES, GROUP)
        for i in range(GROUP):
            out[i] = np.float32(codes[i]) * scale


@cfunc("void(voidptr)", cache=True)
def add_products(argument: Any) -> None:
    """One thread's part of what a SUM record describes."""
    one = carray(argument, 1, SUM)[0]
    panel = one.scratch + add_atomically(one.entered, 1) * PANEL * WEIGHTS
    team, meetings = call(one.team_size), 0
    if one.rounding.groups:
        _round(one.rounding)
    if one.low.blocks:
        _reduce(one)
    if one.rounding.groups or one.low.blocks:
        meetings = meet(one, team)
    _multiply(one, panel, meetings, team)


@cfunc("void(voidptr)", cache=True)
def round_rows(argument: Any) -> None:
    """One thread's part of what a ROUNDING record describes."""
    _round(carray(argument, 1, ROUNDING)[0])


@cfunc("void(voidptr)", cache=True)
def restore_rows(argument: Any) -> None:
    """One thread's part of what a RESTORING record describes."""
    one = carray(argument, 1, RESTORING)[0]
    places, pieces = integers(one.places, one.rows), integers(one.pieces, 2 * one.piece_count)
    for first in portions(one.taken, one.rows, ROWS):
        for row in range(first, min(first + ROWS, one.rows)):
            source, target = one.values + places[row] * one.pitch, one.out.at + row * one.out.stride * BYTES
            for piece in range(one.piece_count):
                count, size = pieces[2 * piece], BYTES * pieces[2 * piece]
                if pieces[2 * piece + 1]:
                    size = count // GROUP * GROUP_LINES * BYTES
                    _restore(source, count // GROUP, target)
                else:
                    copy(source, target, count)
                source, target = source + size, target + count * BYTES


@cfunc("void(voidptr)", cache=True)
def multiply_outer(argument: Any) -> None:
    """One thread's part of what an OUTERS record describes."""
    one = carray(argument, 1, OUTERS)[0]
    panel = one.scratch + add_atomically(one.entered, 1) * STRIP * WEIGHTS
    items = integers(one.items, 2 * one.item_count)
    # As many as the last one needs.
    products = carray(pointer(one.products), items[2 * one.item_count - 2] + 1, OUTER)
    for item in portions(one.taken, one.item_count, 1):
        _add_outer(products[items[2 * item]], items[2 * item + 1], panel)
