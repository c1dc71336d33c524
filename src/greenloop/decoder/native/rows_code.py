"""What training and sampling need of many rows at once, compiled when this is first imported and kept after that."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from greenloop.decoder.native.instructions import BYTES
from greenloop.decoder.native.layout import BIN
from greenloop.decoder.native.parts import (
    REORDERED,
    exp,
    floats,
    highest_of,
    integers,
    inverse_norm,
    open_gate,
    portions,
    scale,
)
from greenloop.decoder.native.records import DRAW, SWEEP
from greenloop.decoder.native.tile import add_atomically, pointer

GROUP = 6
"""Rows of a sweep that a thread takes at a time."""


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
def _weigh_bins(x: Any, highest: Any, colder: Any, weights: Any, edges: Any) -> float:
    """Put each token's weight, and each bin's sum with those before it; the last of these."""
    total = 0.0
    for place in range(edges.size):
        part = slice(place * BIN, min((place + 1) * BIN, x.size))
        total += _weigh(x[part], highest, colder, weights[part])
        edges[place] = total
    return total


@njit
def _likeliest(x: Any, highest: Any) -> int:
    """The first index of the largest value; 0 where there is none."""
    for begin in range(0, x.size, BIN):
        part = x[begin : min(begin + BIN, x.size)]
        if highest_of(part, part[0]) >= highest:
            for i in range(part.size):
                if part[i] >= highest:
                    return begin + i
    return 0


@njit
def _draw(one: Any, number: int, scratch: int) -> None:
    """The draws from one row: a bin by the bins' sums, then a token in it."""
    bins = (one.width + BIN - 1) // BIN
    x, weights = _row(one.x, number, one.width), floats(scratch, one.width)
    edges = carray(pointer(scratch + (one.scratch_size - 2 * bins) * BYTES), bins, np.float64)
    highest, total, weighed = highest_of(x, x[0]), 0.0, -1.0
    begins = integers(one.begins, one.rows + 1)
    count = begins[one.rows]
    uniform, temperatures = (
        carray(pointer(one.uniform), count, np.float64),
        carray(pointer(one.temperatures), count, np.float64),
    )
    tokens, logprobs = integers(one.tokens, count), floats(one.logprobs, count)
    for draw in range(begins[number], begins[number + 1]):
        greedy = temperatures[draw] == 0
        temperature = 1.0 if greedy else temperatures[draw]
        if temperature != weighed:
            colder, weighed = np.float32(1.0 / temperature), temperature
            total = _weigh_bins(x, highest * colder, colder, weights, edges)
        if greedy:
            token = _likeliest(x, highest)
        else:
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
