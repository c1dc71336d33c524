"""The decode step that all threads run at once, compiled when this is first imported and kept after that.

Threads take shares of a phase's work from a common count, so one that is kept waiting by another process leaves its
share to the others. Phases that read what others wrote are parted by `meet`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from greenloop.decoder.native.instructions import BYTES, HALF
from greenloop.decoder.native.layout import FEW, GROUP, GROUP_LINES, LANES, OUTPUTS, PHASES, ROWS, SHEET
from greenloop.decoder.native.parts import (
    INTEGER,
    REORDERED,
    add_packed,
    add_tiles,
    copy,
    floats,
    integers,
    inverse_norm,
    meet,
    open_gate,
    pack,
    portions,
    round_groups,
    round_spread,
    scale,
    soften,
    turn,
    weigh,
)
from greenloop.decoder.native.records import KEEPING, LAYER, PRODUCT, STEP
from greenloop.decoder.native.rounded_tile import rounded_tile
from greenloop.decoder.native.tile import (
    LINE,
    WEIGHTS,
    add_atomically,
    call,
    low_tile,
    plain_tile,
    pointer,
    tile,
    widen_bytes,
    widen_halves,
)

BLOCKS = 2
"""Blocks of a weight that a thread takes at a time."""


@njit
def _multiply(
    packed: int, rows: int, weight: int, line: int, width: int, out: int, out_stride: int, blocks: int, taken: int
) -> None:
    """This thread's share of the products of all packed rows with a laid-out weight."""
    size = width * line
    first = add_atomically(taken, BLOCKS)
    while first < blocks:
        last = min(first + BLOCKS, blocks) - 1
        then = add_atomically(taken, BLOCKS)
        for block in range(first, last + 1):
            at, target = weight + block * size, out + block * WEIGHTS
            following = weight + (then if block == last else block + 1) * size
            add_packed(packed, width, rows, at, line, width, target, out_stride, 0, 0, following, line)
        first = then


@njit
def _widen(narrow: Any, block: int, groups: int, begin: int, count: int, target: int) -> None:
    """The float32 weights [count, OUTPUTS] of a block's inputs from `begin` on."""
    for group in range(begin // GROUP, (begin + count) // GROUP):
        place = block * groups + group
        codes = narrow.codes + place * GROUP * OUTPUTS * narrow.bits // 8
        scales, offsets = narrow.scales + place * WEIGHTS, narrow.offsets + place * WEIGHTS
        out = target + (group * GROUP - begin) * WEIGHTS
        if narrow.bits == 4:
            widen_halves(codes, scales, offsets, out)
        else:
            widen_bytes(codes, scales, offsets, out)


@njit
def _multiply_narrow(one: Any, linear: Any, out: Any, scratch: int, taken: int) -> None:
    """`_multiply` with a base in few bits, made float32 sheet by sheet: the same sums in the same order."""
    width, pitch, stride = linear.width, linear.width + linear.rank, out.stride
    pace = OUTPUTS * linear.narrow.bits // 8
    block = add_atomically(taken, 1)
    while block < linear.blocks:
        then = add_atomically(taken, 1)
        target, up = out.at + block * WEIGHTS, linear.weight + (block * pitch + width) * WEIGHTS
        for begin in range(0, width, SHEET):
            count, packed = min(SHEET, width - begin), one.packed + begin * ROWS * BYTES
            _widen(linear.narrow, block, width // GROUP, begin, count, scratch)
            start = target if begin else 0
            # The codes of the next sheet; those after a block's last are the next block's. First B, which is far away.
            place = block * width + begin + count if begin + count < width else then * width
            following, step = linear.narrow.codes + place * pace, pace
            if begin == 0 and linear.rank:
                following, step = up, linear.rank * WEIGHTS // count
            add_packed(packed, pitch, one.rows, scratch, WEIGHTS, count, target, stride, start, stride, following, step)
        if linear.rank:
            packed = one.packed + width * ROWS * BYTES
            add_packed(packed, pitch, one.rows, up, WEIGHTS, linear.rank, target, stride, target, stride, 0, 0)
        block = then


@njit
def _multiply_rounded(one: Any, linear: Any, out: Any, taken: int) -> None:
    """`_multiply` with a rounded base, and with B as it is."""
    groups, tiles = linear.width // GROUP, (one.rows + ROWS - 1) // ROWS
    pitch, stride = _pitch(linear), out.stride * BYTES
    size, pace = groups * GROUP_LINES * WEIGHTS, WEIGHTS // tiles
    low = groups * GROUP_LINES * BYTES
    block = add_atomically(taken, 1)
    while block < linear.blocks:
        then = add_atomically(taken, 1)
        weight, up = linear.rounded + block * size, linear.weight + block * linear.rank * WEIGHTS
        for row in range(0, one.rows, ROWS):
            count, x = min(ROWS, one.rows - row), one.packed + row * pitch
            target = out.at + row * stride + block * WEIGHTS
            ahead = linear.rounded + then * size + row // ROWS * groups * GROUP_LINES * pace
            rounded_tile(count, x, pitch, weight, groups, target, stride, ahead, pace, 0, 0)
            if linear.rank:
                at, step = x + low, pitch // BYTES
                plain_tile(count, at, step, up, WEIGHTS, linear.rank, target, out.stride, up, 0, target, out.stride, 0)
        block = then


@njit
def _pitch(linear: Any) -> int:
    """Bytes from a row to the next where rows are rounded, with the adapters' low values behind them."""
    pitch: int = (linear.width // GROUP * GROUP_LINES + linear.rank) * BYTES
    return pitch


@njit
def _linear(one: Any, linear: Any, out: Any, scratch: int, taken: int) -> None:
    """A fused linear layer of what is packed. `_attend` adds the bias."""
    if linear.rounded:
        _multiply_rounded(one, linear, out, taken)
        return
    if linear.narrow.bits and one.rows <= FEW:
        _multiply_narrow(one, linear, out, scratch, taken)
        return
    width = linear.width + linear.rank
    _multiply(one.packed, one.rows, linear.weight, linear.line, width, out.at, out.stride, linear.blocks, taken)


@njit
def _round(one: Any, x: Any, first: int, rows: int, linear: Any) -> None:
    """`_pack` for a rounded base: the rows rounded, with the low values of what they were before behind each."""
    width, pitch, groups = linear.width, _pitch(linear), linear.width // GROUP
    at = x.at + first * x.stride * BYTES
    for block in range(linear.down_blocks):
        weight, low = linear.down + block * width * LINE, at + (width + block * LANES) * BYTES
        tile(rows, at, x.stride, weight, LINE, width, low, x.stride, weight, 0, 0, 0, 0)
    for row in range(rows):
        source, target = at + row * x.stride * BYTES, one.packed + (first + row) * pitch
        round_groups(source, target, groups)
        copy(source + width * BYTES, target + groups * GROUP_LINES * BYTES, linear.rank)


@njit
def _pack(one: Any, x: Any, first: int, rows: int, linear: Any) -> None:
    """Pack a tile of rows of a linear layer's input, with the adapters' low values x A^T behind it."""
    at, width = x.at + first * x.stride * BYTES, linear.width
    if linear.rounded:
        _round(one, x, first, rows, linear)
        return
    low, packed = at + width * BYTES, one.packed + first * (width + linear.rank) * BYTES
    pack(at, x.stride, rows, width, packed)
    for block in range(linear.down_blocks):
        weight = linear.down + block * width * LINE
        low_tile(rows, packed, ROWS, weight, LINE, width, low + block * LINE, x.stride, weight, 0, 0, 0, 0)
    pack(low, x.stride, rows, linear.rank, packed + width * ROWS * BYTES)


@njit
def _kept_size(one: Any, count: int) -> int:
    """Values that so many of a layer take where they are kept."""
    return count // GROUP * GROUP_LINES if one.kept_rounded and count % GROUP == 0 else count


@njit
def _keep(one: Any, number: int, row: int, offset: int, source: int, count: int) -> int:
    """Copy values of a row to where those of a layer are kept, if they are; the offset behind them.

    Whole groups may be kept rounded, but not what comes after all layers, which the log-probs are made of.
    """
    size = _kept_size(one, count) if number < one.layer_count else count
    if one.kept:
        place = integers(one.kept, one.rows)[row]
        if place:
            at = place + (number * one.kept_layer + offset) * BYTES
            if size != count:
                round_groups(source, at, count // GROUP)
            else:
                copy(source, at, count)
    return offset + size


@njit(error_model="numpy", fastmath=REORDERED)
def _enter(one: Any, number: int, offset: int, norm: int, linear: Any, changed: bool, taken: int) -> None:
    """Add the last change to the residual stream, if there is one, and normalise it for a linear layer."""
    width = one.width
    weight = floats(norm, width)
    for first in portions(taken, one.rows, ROWS):
        rows = min(ROWS, one.rows - first)
        for row in range(first, first + rows):
            hidden = floats(one.hidden.at + row * one.hidden.stride * BYTES, width)
            normed = floats(one.normed.at + row * one.normed.stride * BYTES, width)
            if changed:
                change = floats(one.change.at + row * one.change.stride * BYTES, width)
                for i in range(width):
                    hidden[i] += change[i]
            scale(hidden, inverse_norm(hidden, one.eps), weight, normed)
        _pack(one, one.normed, first, rows, linear)
        for row in range(first, first + rows):
            behind = _keep(one, number, row, offset, one.hidden.at + row * one.hidden.stride * BYTES, width)
            _keep(one, number, row, behind, one.normed.at + (row * one.normed.stride + width) * BYTES, linear.rank)


@njit
def _gather(one: Any, number: int, offset: int, linear: Any, taken: int) -> None:
    """Pack what attention has made of all rows."""
    heads = one.kv_heads * one.heads * one.head_width
    for first in portions(taken, one.rows, ROWS):
        rows = min(ROWS, one.rows - first)
        _pack(one, one.mixed, first, rows, linear)
        for row in range(first, first + rows):
            projected = heads + 2 * one.kv_heads * one.head_width
            behind = _keep(one, number, row, offset, one.qkv.at + row * one.qkv.stride * BYTES, projected)
            mixed = one.mixed.at + row * one.mixed.stride * BYTES
            behind = _keep(one, number, row, behind, mixed, heads)
            _keep(one, number, row, behind, mixed + heads * BYTES, linear.rank)


@njit(error_model="numpy", fastmath=REORDERED)
def _gate(one: Any, number: int, offset: int, linear: Any, taken: int) -> None:
    """silu(gate) * up."""
    inner = one.inner
    for first in portions(taken, one.rows, ROWS):
        rows = min(ROWS, one.rows - first)
        for row in range(first, first + rows):
            both = floats(one.gate_up.at + row * one.gate_up.stride * BYTES, 2 * inner)
            gated = floats(one.gated.at + row * one.gated.stride * BYTES, inner)
            open_gate(both, gated)
        _pack(one, one.gated, first, rows, linear)
        for row in range(first, first + rows):
            gate_up = one.gate_up.at + row * one.gate_up.stride * BYTES
            behind = _keep(one, number, row, offset, gate_up, 2 * inner)
            _keep(one, number, row, behind, one.gated.at + (row * one.gated.stride + inner) * BYTES, linear.rank)


@njit
def _attend(one: Any, layer: Any, scratch: int, taken: int) -> None:
    """Attention of every row over its prompt and its own strip; the rows of a chunk read their prompt together."""
    chunks = integers(one.chunks, one.chunk_count * 3)
    for item in portions(taken, one.chunk_count * one.kv_heads, 1):
        chunk, head = item // one.kv_heads, item % one.kv_heads
        _attend_chunk(one, layer, head, chunks[3 * chunk], chunks[3 * chunk + 1], chunks[3 * chunk + 2], scratch)


@njit(error_model="numpy", fastmath=REORDERED)
def _attend_chunk(one: Any, layer: Any, head: int, slot: int, begin: int, rows: int, scratch: int) -> None:
    """One KV head of the rows that `order` lists from `begin` on, all of one slot.

    The query heads of all rows are one matrix; both products of attention are products with blocks, because keys lie
    as [S / 16, D, 16] and values as [D / 16, S, 16]. Where they are integers a key's scale is a factor of its score,
    and a value's of its weight.
    """
    rounded = layer.own.k_scales != 0
    size = HALF if rounded else BYTES
    line = LANES * size
    width, group = one.head_width, one.heads
    queries, places = rows * group, layer.prompt.places + layer.own.places
    query, scores = scratch, scratch + queries * width * BYTES
    over_prompt = scores + queries * places * BYTES
    over_own = over_prompt + queries * width * BYTES
    order, own = integers(one.order, one.rows), integers(one.own, one.rows)
    strip = layer.own.places * width * size
    for place in range(rows):
        row = order[begin + place]
        _place(one, layer, head, row, own[row], query + place * group * width * BYTES, over_own)

    prompt = integers(one.prompts, slot + 1)[slot]
    behind = (slot * one.kv_heads + head) * layer.prompt.places
    at, apart, blocks = behind * width * size, width * line, (prompt + LANES - 1) // LANES
    _add_blocks(query, width, queries, layer.prompt.k + at, apart, blocks, line, width, scores, places)
    for place in range(rows):
        row = order[begin + place]
        mine = layer.own.k + (row * one.kv_heads + head) * strip
        first = place * group
        target, queries_at = scores + (first * places + layer.prompt.places) * BYTES, query + first * width * BYTES
        blocks = own[row] // LANES + 1
        _add_blocks(queries_at, width, group, mine, apart, blocks, line, width, target, places)

    for number in range(queries):
        row = order[begin + number // group]
        first_scores = floats(scores + number * places * BYTES, prompt)
        second_scores = floats(scores + (number * places + layer.prompt.places) * BYTES, own[row] + 1)
        mine = (row * one.kv_heads + head) * layer.own.places * BYTES
        if rounded:
            weigh(first_scores, floats(layer.prompt.k_scales + behind * BYTES, prompt))
            weigh(second_scores, floats(layer.own.k_scales + mine, own[row] + 1))
        soften(first_scores, second_scores)
        if rounded:
            weigh(first_scores, floats(layer.prompt.v_scales + behind * BYTES, prompt))
            weigh(second_scores, floats(layer.own.v_scales + mine, own[row] + 1))

    values, apart, blocks = layer.prompt.v + at, layer.prompt.places * line, width // LANES
    _add_blocks(scores, places, queries, values, apart, blocks, line, prompt, over_prompt, width)
    for place in range(rows):
        row = order[begin + place]
        mine = layer.own.v + (row * one.kv_heads + head) * strip
        first = place * group
        weights, target = scores + (first * places + layer.prompt.places) * BYTES, over_own + first * width * BYTES
        apart = layer.own.places * line
        _add_blocks(weights, places, group, mine, apart, blocks, line, own[row] + 1, target, width)
        first_sum = floats(over_prompt + first * width * BYTES, group * width)
        second_sum = floats(over_own + first * width * BYTES, group * width)
        mixed = floats(one.mixed.at + (row * one.mixed.stride + head * group * width) * BYTES, group * width)
        for i in range(group * width):
            mixed[i] = first_sum[i] + second_sum[i]


@njit
def _add_blocks(
    x: int, stride: int, rows: int, first: int, apart: int, blocks: int, line: int, width: int, out: int, step: int
) -> None:
    """`add_tiles` for keys and values, float32 or integers."""
    if line == LINE:
        add_tiles(x, stride, rows, first, apart, blocks, line, width, out, step, False)
    else:
        add_tiles(x, stride, rows, first, apart, blocks, line, width, out, step, False, True)


@njit(fastmath=REORDERED)
def _place(one: Any, layer: Any, head: int, row: int, position: int, query: int, space: int) -> None:
    """Turn a row's queries and key by its position; put key and value into its strip.

    Args:
        one: the record.
        layer: its record.
        head: of keys and values.
        row: of the step.
        position: of its token in the strip.
        query: space for the queries.
        space: for a key.
    """
    width, group = one.head_width, one.heads
    half = width // 2
    cos, sin = floats(one.cos + row * half * BYTES, half), floats(one.sin + row * half * BYTES, half)
    heads = one.kv_heads * group
    projected = floats(one.qkv.at + row * one.qkv.stride * BYTES, (heads + 2 * one.kv_heads) * width)
    if layer.bias:
        bias = floats(layer.bias, (heads + 2 * one.kv_heads) * width)
        for begin, count in ((head * group, group), (heads + head, 1), (heads + one.kv_heads + head, 1)):
            for i in range(begin * width, (begin + count) * width):
                projected[i] += bias[i]
    whole, factor = np.float32(1.0), np.float32(one.scale)
    for number in range(group):
        source = (head * group + number) * width
        turn(projected[source : source + width], cos, sin, whole, factor, floats(query + number * width * BYTES, width))
    source, key = (heads + head) * width, floats(space, width)
    for i in range(half):
        left, right = projected[source + i], projected[source + half + i]
        key[i] = left * cos[i] - right * sin[i]
        key[half + i] = right * cos[i] + left * sin[i]
    source += one.kv_heads * width
    _keep_token(key, projected[source : source + width], layer.own, row * one.kv_heads + head, position)


@njit
def _keep_token(key: Any, value: Any, strips: Any, strip: int, position: int) -> None:
    """Put a head's key and value of a token where its strip has them."""
    width, places = key.size, strips.places
    begin, block, lane = strip * places * width, position // LANES, position % LANES
    if strips.k_scales:
        scale_at = (strip * places + position) * BYTES
        codes = strips.k + (begin + block * width * LANES + lane) * HALF
        round_spread(key, codes, LANES * LANES, LANES, strips.k_scales + scale_at)
        codes = strips.v + (begin + position * LANES) * HALF
        round_spread(value, codes, places * LANES, 1, strips.v_scales + scale_at)
        return
    keys, values = floats(strips.k + begin * BYTES, places * width), floats(strips.v + begin * BYTES, places * width)
    for i in range(width):
        keys[(block * width + i) * LANES + lane] = key[i]
        values[((i // LANES) * places + position) * LANES + i % LANES] = value[i]


@njit
def _decode(one: Any) -> None:
    """The whole decoder. A phase is what the threads do between two meetings."""
    team = call(one.team_size)
    scratch = one.scratch + add_atomically(one.entered, 1) * one.scratch_size * BYTES
    layers = carray(pointer(one.layers), one.layer_count, LAYER)
    taken, meetings = one.counts, 0
    for number in range(one.layer_count):
        layer = layers[number]
        # What is kept of a layer, in the order of `traces.PIECES`.
        after_qkv = _kept_size(one, one.width) + _kept_size(one, layer.qkv.rank)
        heads = one.kv_heads * one.heads * one.head_width
        middle = after_qkv + _kept_size(one, heads + 2 * one.kv_heads * one.head_width)
        middle += _kept_size(one, heads) + _kept_size(one, layer.output.rank)
        gate_up = middle + _kept_size(one, one.width) + _kept_size(one, layer.gate_up.rank)
        _enter(one, number, 0, layer.input_norm, layer.qkv, number > 0, taken)
        meetings = meet(one, meetings + team)
        _linear(one, layer.qkv, one.qkv, scratch, taken + INTEGER)
        meetings = meet(one, meetings + team)
        _attend(one, layer, scratch, taken + 2 * INTEGER)
        meetings = meet(one, meetings + team)
        _gather(one, number, after_qkv, layer.output, taken + 3 * INTEGER)
        meetings = meet(one, meetings + team)
        _linear(one, layer.output, one.change, scratch, taken + 4 * INTEGER)
        meetings = meet(one, meetings + team)
        _enter(one, number, middle, layer.mlp_norm, layer.gate_up, True, taken + 5 * INTEGER)
        meetings = meet(one, meetings + team)
        _linear(one, layer.gate_up, one.gate_up, scratch, taken + 6 * INTEGER)
        meetings = meet(one, meetings + team)
        _gate(one, number, gate_up, layer.down, taken + 7 * INTEGER)
        meetings = meet(one, meetings + team)
        _linear(one, layer.down, one.change, scratch, taken + 8 * INTEGER)
        meetings = meet(one, meetings + team)
        taken += PHASES * INTEGER
    _enter(one, one.layer_count, 0, one.norm, one.head, True, taken)
    meet(one, meetings + team)
    _linear(one, one.head, one.logits, scratch, taken + INTEGER)


@cfunc("void(voidptr)", cache=True)
def product(argument: Any) -> None:
    """One thread's part of the product that a PRODUCT record describes."""
    one = carray(argument, 1, PRODUCT)[0]
    width = one.width
    for first in portions(one.tiles, one.rows, ROWS):
        offset = first * width * BYTES
        pack(one.x + offset, width, min(ROWS, one.rows - first), width, one.packed + offset)
    meet(one, call(one.team_size))
    stride = one.blocks * OUTPUTS
    _multiply(one.packed, one.rows, one.weight, one.line, width, one.out, stride, one.blocks, one.taken)


@cfunc("void(voidptr)", cache=True)
def step(argument: Any) -> None:
    """One thread's part of the decode step that a STEP record describes."""
    _decode(carray(argument, 1, STEP)[0])


@cfunc("void(voidptr)", cache=True)
def keep(argument: Any) -> None:
    """One thread's part of what a KEEPING record describes."""
    one = carray(argument, 1, KEEPING)[0]
    sources, slots = integers(one.sources, one.rows), integers(one.slots, one.rows)
    positions = integers(one.positions, one.rows)
    for first in portions(one.taken, one.rows, LANES):
        for row in range(first, min(first + LANES, one.rows)):
            key = one.key.at + sources[row] * one.key.stride * BYTES
            value = one.value.at + sources[row] * one.value.stride * BYTES
            for head in range(one.kv_heads):
                strip, offset = slots[row] * one.kv_heads + head, head * one.head_width * BYTES
                mine, read = floats(key + offset, one.head_width), floats(value + offset, one.head_width)
                _keep_token(mine, read, one.strips, strip, positions[row])
