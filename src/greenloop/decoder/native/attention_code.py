"""Attention over packed groups, forward and backward, compiled when this is first imported and kept after that.

A segment is a prompt, or tokens behind it up to where completions part; a thread takes one segment and one KV head at a
time. Queries go in blocks of tokens, with their scores over all keys up to their own, so what is held grows with the
tokens. Keys and values that several segments read get a gradient from each, a parcel, and `collect` adds them up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from greenloop.decoder.native.instructions import BYTES
from greenloop.decoder.native.layout import LANES, QUERIES
from greenloop.decoder.native.parts import INTEGER, REORDERED, add_tiles, floats, integers, portions, soften, turn
from greenloop.decoder.native.records import ATTENTION
from greenloop.decoder.native.tile import LINE, TURN, add_atomically, turned

WHOLE = np.float32(1.0)
FORWARD, BACK = np.float32(1.0), np.float32(-1.0)
"""Ways to turn a head."""


@njit
def _whole(count: int) -> int:
    """The next multiple of 16."""
    return (count + LANES - 1) // LANES * LANES


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
    begin, tokens, before = segment[0], segment[1], segment[2]
    seen = integers(one.seen + segment[3] * INTEGER, before)
    count: int = before + tokens
    for place in range(count):
        token = seen[place] if place < before else begin + place - before
        cos, sin = _angles(one, token)
        key, value = (
            _head(one.qkv, token, heads + head, width),
            _head(one.qkv, token, heads + one.kv_heads + head, width),
        )
        turn(key, cos, sin, FORWARD, WHOLE, floats(keys + place * width * BYTES, width))
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
            turn(query, cos, sin, FORWARD, np.float32(one.scale), target)


@njit
def _scores(x: int, rows: int, blocks: int, width: int, seen: int, out: int, pitch: int) -> None:
    """Products of rows [n, D] with the first keys or values, laid out, to [n, pitch]."""
    add_tiles(x, width, rows, blocks, width * LINE, _whole(seen) // LANES, LINE, width, out, pitch, False)


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
    _scores(queries, rows, blocks, one.head_width, seen, weights, one.keys)
    for row in range(rows):
        at, mine = weights + row * one.keys * BYTES, before + row // one.heads + 1
        soften(floats(at, mine), floats(at, 0))
        _clear(floats(at + mine * BYTES, _whole(seen) - mine))
    return seen


@njit
def _over(weights: int, pitch: int, rows: int, values: int, width: int, seen: int, out: int) -> None:
    """[rows, S] weights times [S, D] values to [rows, D]."""
    add_tiles(weights, pitch, rows, values, LINE, width // LANES, width * BYTES, seen, out, width, False)


@njit
def _segment(one: Any, segment: Any, head: int, scratch: int) -> None:
    """The attended values of one segment and one KV head."""
    width, size = one.head_width, one.keys * one.head_width * BYTES
    keys, values, blocks, queries = scratch, scratch + size, scratch + 2 * size, scratch + 3 * size
    out = queries + QUERIES * one.heads * width * BYTES
    weights = out + QUERIES * one.heads * width * BYTES
    count = _gather(one, segment, head, keys, values)
    _blocks(keys, _whole(count), width, blocks)
    for first in range(0, segment[1], QUERIES):
        begin, tokens = segment[0] + first, min(QUERIES, segment[1] - first)
        _queries(one, begin, tokens, head, queries)
        seen = _weights(one, queries, tokens, segment[2] + first, blocks, weights)
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
def _accumulate(one: Any, x: int, table: int, keys: int, rows: int, out: int) -> None:
    """Add [D, rows] times the first keys' columns of a [rows, keys] table to those of [D, keys]."""
    line, pitch = one.keys * BYTES, QUERIES * one.heads
    add_tiles(x, pitch, one.head_width, table, LINE, keys // LANES, line, rows, out, one.keys, True)


@njit
def _deliver(one: Any, token: int, head: int, key: int, value: int) -> None:
    """Write the gradients of a token's key, turned back, and value."""
    width, heads = one.head_width, one.kv_heads * one.heads
    cos, sin = _angles(one, token)
    turn(floats(key, width), cos, sin, BACK, WHOLE, _head(one.of_qkv, token, heads + head, width))
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
    whole = _whole(count)
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
        seen = _weights(one, queries, tokens, segment[2] + first, key_blocks, weights)
        _scores(mixed, rows, value_blocks, width, seen, of_scores, one.keys)
        through = _whole(seen)
        for row in range(rows):
            offset = row * one.keys * BYTES
            # Keys that are not seen yet have no weight.
            _soften_back(floats(weights + offset, through), floats(of_scores + offset, through))
        # What stands between rows and the next multiple of 8 is turned as well, and not read.
        _transpose(queries, width, (rows + TURN - 1) // TURN * TURN, width, turned_queries, pitch)
        _transpose(mixed, width, (rows + TURN - 1) // TURN * TURN, width, turned_mixed, pitch)
        _accumulate(one, turned_queries, of_scores, through, rows, of_keys)
        _accumulate(one, turned_mixed, weights, through, rows, of_values)
        # The queries have been read.
        _over(of_scores, one.keys, rows, keys, width, seen, queries)
        for place in range(tokens):
            cos, sin = _angles(one, begin + place)
            for number in range(one.heads):
                of_query = floats(queries + (place * one.heads + number) * width * BYTES, width)
                target = _head(one.of_qkv, begin + place, head * one.heads + number, width)
                turn(of_query, cos, sin, BACK, np.float32(one.scale), target)
    _transpose(of_keys, one.keys, width, whole, keys, width)
    _transpose(of_values, one.keys, width, whole, values, width)
    # Its own keys come after those before them, and are shared if segments go on from it.
    shared = segment[4]
    for place in range(shared):
        parcel = one.parcels + ((segment[3] + place) * one.kv_heads + head) * 2 * width * BYTES
        _copy(floats(keys + place * width * BYTES, width), floats(parcel, width))
        _copy(floats(values + place * width * BYTES, width), floats(parcel + width * BYTES, width))
    for place in range(shared, count):
        token = segment[0] + place - segment[2]
        _deliver(one, token, head, keys + place * width * BYTES, values + place * width * BYTES)


@njit
def _collect(one: Any, shared: Any) -> None:
    """Add up the parcels of one token in the first of them, and deliver it."""
    width = one.head_width
    size = one.kv_heads * 2 * width
    places = integers(one.places + shared[1] * INTEGER, shared[2])
    first = one.parcels + places[0] * size * BYTES
    total = floats(first, size)
    for number in range(1, places.size):
        _increase(total, floats(one.parcels + places[number] * size * BYTES, size))
    for head in range(one.kv_heads):
        found = first + head * 2 * width * BYTES
        _deliver(one, shared[0], head, found, found + width * BYTES)


@njit
def _own_scratch(one: Any) -> Any:
    """Where this thread writes."""
    return one.scratch + add_atomically(one.entered, 1) * one.scratch_size * BYTES


@njit
def _taken(one: Any) -> Any:
    """The segments and KV heads that this thread takes."""
    for item in portions(one.taken, one.segment_count * one.kv_heads, 1):
        yield integers(one.segments + item // one.kv_heads * 5 * INTEGER, 5), item % one.kv_heads


@cfunc("void(voidptr)", cache=True)
def attend(argument: Any) -> None:
    """One thread's part of the attended values that an ATTENTION record describes."""
    one = carray(argument, 1, ATTENTION)[0]
    scratch = _own_scratch(one)
    for segment, head in _taken(one):
        _segment(one, segment, head, scratch)


@cfunc("void(voidptr)", cache=True)
def attend_back(argument: Any) -> None:
    """One thread's part of the gradients, but for shared keys and values."""
    one = carray(argument, 1, ATTENTION)[0]
    scratch = _own_scratch(one)
    for segment, head in _taken(one):
        _segment_back(one, segment, head, scratch)


@cfunc("void(voidptr)", cache=True)
def collect(argument: Any) -> None:
    """One thread's part of the gradients of shared keys and values."""
    one = carray(argument, 1, ATTENTION)[0]
    for number in portions(one.taken, one.shared_count, 1):
        _collect(one, integers(one.shared + number * 3 * INTEGER, 3))
