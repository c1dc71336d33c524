"""Attention over packed groups, forward and backward, compiled when this is first imported and kept after that.

A segment is a prompt, or a completion behind its prompt; a thread takes one segment and one KV head at a time. Queries
go in blocks of tokens, with their scores over all keys up to their own, so what is held grows with the tokens. The
prompt's keys and values get gradients from all its segments: each leaves a parcel, and `collect` adds them up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from greenloop.decoder.native.layout import LANES, QUERIES
from greenloop.decoder.native.parts import INTEGER, REORDERED, exp, floats, integers
from greenloop.decoder.native.records import ATTENTION
from greenloop.decoder.native.tile import BYTES, LINE, TILE, TURN, add_atomically, tile, turned


@njit
def _product(
    x: int, x_stride: int, rows: int, block: int, line: int, width: int, out: int, out_stride: int, more: bool
) -> None:
    """Products of rows with [width, 16] values whose lines are `line` bytes apart, added to `out` if there is more."""
    for row in range(0, rows, TILE):
        at, target = x + row * x_stride * BYTES, out + row * out_stride * BYTES
        count, start = min(TILE, rows - row), target if more else 0
        tile(count, at, x_stride, block, line, width, target, out_stride, block, 0, start, out_stride)


@njit(fastmath=REORDERED)
def _turn(source: Any, cos: Any, sin: Any, factor: Any, target: Any) -> None:
    """A head at its position, times `factor`; with `-sin` back from there."""
    half = cos.size
    for i in range(half):
        left, right = source[i], source[half + i]
        target[i] = (left * cos[i] - right * sin[i]) * factor
        target[half + i] = (right * cos[i] + left * sin[i]) * factor


@njit(fastmath=REORDERED)
def _turn_back(source: Any, cos: Any, sin: Any, factor: Any, target: Any) -> None:
    half = cos.size
    for i in range(half):
        left, right = source[i], source[half + i]
        target[i] = (left * cos[i] + right * sin[i]) * factor
        target[half + i] = (right * cos[i] - left * sin[i]) * factor


@njit
def _clear(target: Any) -> None:
    # Numba compiles an assignment to a slice ten times as long.
    for i in range(target.size):
        target[i] = 0.0


@njit
def _copy(source: Any, target: Any) -> None:
    for i in range(target.size):
        target[i] = source[i]


@njit
def _increase(total: Any, more: Any) -> None:
    for i in range(total.size):
        total[i] += more[i]


@njit
def _angles(one: Any, token: int) -> Any:
    half = one.head_width // 2
    return floats(one.cos + token * half * BYTES, half), floats(one.sin + token * half * BYTES, half)


@njit
def _head(rows: Any, token: int, head: int, width: int) -> Any:
    return floats(rows.at + (token * rows.stride + head * width) * BYTES, width)


@njit
def _transpose(source: int, source_stride: int, rows: int, columns: int, target: int, target_stride: int) -> None:
    """[rows, columns], both multiples of 8, to [columns, rows]."""
    for row in range(0, rows, TURN):
        for column in range(0, columns, TURN):
            at = source + (row * source_stride + column) * BYTES
            turned(at, source_stride, target + (column * target_stride + row) * BYTES, target_stride)


@njit
def _blocks(source: int, count: int, width: int, target: int) -> None:
    """[count, width] laid out as [count / 16, width, 16]; the count is a multiple of 16."""
    for row in range(0, count, LANES):
        _transpose(source + row * width * BYTES, width, LANES, width, target + row * width * BYTES, LANES)


@njit
def _gather(one: Any, segment: Any, head: int, keys: int, values: int) -> int:
    """Put a segment's keys, turned, and values as [S, D] each; S, up to whose next multiple of 16 all is 0."""
    width, heads = one.head_width, one.kv_heads * one.heads
    begin, tokens, prompt, trunk = segment[0], segment[1], segment[2], segment[3]
    count: int = trunk + tokens
    for place in range(count):
        token = prompt + place if place < trunk else begin + place - trunk
        cos, sin = _angles(one, token)
        key, value = (
            _head(one.qkv, token, heads + head, width),
            _head(one.qkv, token, heads + one.kv_heads + head, width),
        )
        _turn(key, cos, sin, np.float32(1.0), floats(keys + place * width * BYTES, width))
        _copy(value, floats(values + place * width * BYTES, width))
    missing = -count % LANES * width
    _clear(floats(keys + count * width * BYTES, missing))
    _clear(floats(values + count * width * BYTES, missing))
    return count


@njit
def _queries(one: Any, begin: int, tokens: int, head: int, queries: int) -> None:
    """Put the queries of some tokens and one KV head, turned and scaled, as [tokens * G, D]."""
    width = one.head_width
    for place in range(tokens):
        cos, sin = _angles(one, begin + place)
        for number in range(one.heads):
            query = _head(one.qkv, begin + place, head * one.heads + number, width)
            target = floats(queries + (place * one.heads + number) * width * BYTES, width)
            _turn(query, cos, sin, np.float32(one.scale), target)


@njit(error_model="numpy", fastmath=REORDERED)
def _soften(row: Any, seen: int) -> None:
    """Softmax over the first `seen` values; 0 behind them."""
    highest = row[0]
    for i in range(seen):
        highest = max(highest, row[i])
    total = np.float32(0.0)
    for i in range(seen):
        row[i] = exp(row[i] - highest)
        total += row[i]
    share = np.float32(1.0) / total
    for i in range(seen):
        row[i] *= share
    for i in range(seen, row.size):
        row[i] = 0.0


@njit
def _weights(one: Any, queries: int, tokens: int, before: int, blocks: int, weights: int) -> int:
    """Put the attention weights of some tokens as [tokens * G, keys]; how many keys the last of them sees.

    Args:
        one: the record.
        queries: of the tokens.
        tokens: their count.
        before: keys before the first token's own.
        blocks: keys, laid out.
        weights: where to.
    """
    rows = tokens * one.heads
    seen: int = before + tokens
    for block in range((seen + LANES - 1) // LANES):
        at = blocks + block * one.head_width * LINE
        _product(queries, one.head_width, rows, at, LINE, one.head_width, weights + block * LINE, one.keys, False)
    whole = (seen + LANES - 1) // LANES * LANES
    for row in range(rows):
        _soften(floats(weights + row * one.keys * BYTES, whole), before + row // one.heads + 1)
    return seen


@njit
def _over(weights: int, pitch: int, rows: int, values: int, width: int, seen: int, out: int) -> None:
    """[rows, S] weights times [S, D] values to [rows, D]."""
    for block in range(width // LANES):
        _product(weights, pitch, rows, values + block * LINE, width * BYTES, seen, out + block * LINE, width, False)


@njit
def _segment(one: Any, segment: Any, head: int, scratch: int) -> None:
    """The attended values of one segment and one KV head."""
    width, size = one.head_width, one.keys * one.head_width * BYTES
    keys, values, blocks, queries = scratch, scratch + size, scratch + 2 * size, scratch + 3 * size
    out = queries + QUERIES * one.heads * width * BYTES
    weights = out + QUERIES * one.heads * width * BYTES
    count = _gather(one, segment, head, keys, values)
    _blocks(keys, (count + LANES - 1) // LANES * LANES, width, blocks)
    for first in range(0, segment[1], QUERIES):
        begin, tokens = segment[0] + first, min(QUERIES, segment[1] - first)
        _queries(one, begin, tokens, head, queries)
        seen = _weights(one, queries, tokens, segment[3] + first, blocks, weights)
        _over(weights, one.keys, tokens * one.heads, values, width, seen, out)
        for place in range(tokens):
            both = floats(out + place * one.heads * width * BYTES, one.heads * width)
            _copy(both, _head(one.mixed, begin + place, head, one.heads * width))


@njit(error_model="numpy", fastmath=REORDERED)
def _soften_back(weights: Any, gradient: Any) -> None:
    """The gradient of the scores from that of the weights, in its place."""
    along = np.float32(0.0)
    for i in range(weights.size):
        along += weights[i] * gradient[i]
    for i in range(weights.size):
        gradient[i] = weights[i] * (gradient[i] - along)


@njit
def _deliver(one: Any, token: int, head: int, key: int, value: int) -> None:
    """Write the gradients of a token's key, turned back, and value."""
    width, heads = one.head_width, one.kv_heads * one.heads
    cos, sin = _angles(one, token)
    _turn_back(floats(key, width), cos, sin, np.float32(1.0), _head(one.of_qkv, token, heads + head, width))
    _copy(floats(value, width), _head(one.of_qkv, token, heads + one.kv_heads + head, width))


@njit
def _segment_back(one: Any, segment: Any, head: int, scratch: int) -> None:
    """The gradients of one segment's queries, keys and values of one KV head."""
    width, size = one.head_width, one.keys * one.head_width * BYTES
    keys, values, key_blocks, value_blocks = scratch, scratch + size, scratch + 2 * size, scratch + 3 * size
    of_keys, of_values = scratch + 4 * size, scratch + 5 * size
    block = QUERIES * one.heads * width * BYTES
    queries = scratch + 6 * size
    mixed, turned_queries, turned_mixed = queries + block, queries + 2 * block, queries + 3 * block
    weights = queries + 4 * block
    of_scores = weights + QUERIES * one.heads * one.keys * BYTES
    count = _gather(one, segment, head, keys, values)
    whole = (count + LANES - 1) // LANES * LANES
    _blocks(keys, whole, width, key_blocks)
    _blocks(values, whole, width, value_blocks)
    _clear(floats(of_keys, one.keys * width))
    _clear(floats(of_values, one.keys * width))
    pitch = QUERIES * one.heads
    for first in range(0, segment[1], QUERIES):
        begin, tokens = segment[0] + first, min(QUERIES, segment[1] - first)
        rows = tokens * one.heads
        _queries(one, begin, tokens, head, queries)
        for place in range(tokens):
            both = floats(mixed + place * one.heads * width * BYTES, one.heads * width)
            _copy(_head(one.mixed, begin + place, head, one.heads * width), both)
        seen = _weights(one, queries, tokens, segment[3] + first, key_blocks, weights)
        for number in range((seen + LANES - 1) // LANES):
            at = value_blocks + number * width * LINE
            _product(mixed, width, rows, at, LINE, width, of_scores + number * LINE, one.keys, False)
        through = (seen + LANES - 1) // LANES * LANES
        for row in range(rows):
            offset = row * one.keys * BYTES
            # Keys that are not seen yet have no weight.
            _soften_back(floats(weights + offset, through), floats(of_scores + offset, through))
        # What stands between rows and the next multiple of 8 is turned as well, and not read.
        _transpose(queries, width, (rows + TURN - 1) // TURN * TURN, width, turned_queries, pitch)
        _transpose(mixed, width, (rows + TURN - 1) // TURN * TURN, width, turned_mixed, pitch)
        for number in range(through // LANES):
            offset, line = number * LINE, one.keys * BYTES
            _product(turned_queries, pitch, width, of_scores + offset, line, rows, of_keys + offset, one.keys, True)
            _product(turned_mixed, pitch, width, weights + offset, line, rows, of_values + offset, one.keys, True)
        # The queries have been read.
        _over(of_scores, one.keys, rows, keys, width, seen, queries)
        for place in range(tokens):
            cos, sin = _angles(one, begin + place)
            for number in range(one.heads):
                of_query = floats(queries + (place * one.heads + number) * width * BYTES, width)
                target = _head(one.of_qkv, begin + place, head * one.heads + number, width)
                _turn_back(of_query, cos, sin, np.float32(one.scale), target)
    _transpose(of_keys, one.keys, width, whole, keys, width)
    _transpose(of_values, one.keys, width, whole, values, width)
    own = segment[3]
    if own == 0:
        # A prompt: all its keys are shared.
        own = count
    for place in range(own):
        parcel = one.parcels + ((segment[4] + place) * one.kv_heads + head) * 2 * width * BYTES
        _copy(floats(keys + place * width * BYTES, width), floats(parcel, width))
        _copy(floats(values + place * width * BYTES, width), floats(parcel + width * BYTES, width))
    for place in range(own, count):
        _deliver(one, segment[0] + place - own, head, keys + place * width * BYTES, values + place * width * BYTES)


@njit
def _collect(one: Any, trunk: Any, head: int) -> None:
    """Add up the parcels of one prompt and one KV head in the first of them, and deliver it."""
    width = one.head_width
    size = one.kv_heads * 2 * width * BYTES
    for place in range(trunk[1]):
        first = one.parcels + (trunk[2] + place) * size + head * 2 * width * BYTES
        total = floats(first, 2 * width)
        for number in range(1, trunk[3]):
            _increase(total, floats(first + number * trunk[1] * size, 2 * width))
        _deliver(one, trunk[0] + place, head, first, first + width * BYTES)


@cfunc("void(voidptr)", cache=True)
def attend(argument: Any) -> None:
    """One thread's part of the attended values that an ATTENTION record describes."""
    one = carray(argument, 1, ATTENTION)[0]
    scratch = one.scratch + add_atomically(one.entered, 1) * one.scratch_size * BYTES
    item = add_atomically(one.taken, 1)
    while item < one.segment_count * one.kv_heads:
        segment = integers(one.segments + item // one.kv_heads * 5 * INTEGER, 5)
        _segment(one, segment, item % one.kv_heads, scratch)
        item = add_atomically(one.taken, 1)


@cfunc("void(voidptr)", cache=True)
def attend_back(argument: Any) -> None:
    """One thread's part of the gradients, but for the prompts' keys and values."""
    one = carray(argument, 1, ATTENTION)[0]
    scratch = one.scratch + add_atomically(one.entered, 1) * one.scratch_size * BYTES
    item = add_atomically(one.taken, 1)
    while item < one.segment_count * one.kv_heads:
        segment = integers(one.segments + item // one.kv_heads * 5 * INTEGER, 5)
        _segment_back(one, segment, item % one.kv_heads, scratch)
        item = add_atomically(one.taken, 1)


@cfunc("void(voidptr)", cache=True)
def collect(argument: Any) -> None:
    """One thread's part of the gradients of the prompts' keys and values."""
    one = carray(argument, 1, ATTENTION)[0]
    item = add_atomically(one.taken, 1)
    while item < one.trunk_count * one.kv_heads:
        trunk = integers(one.trunks + item // one.kv_heads * 4 * INTEGER, 4)
        _collect(one, trunk, item % one.kv_heads)
        item = add_atomically(one.taken, 1)
