"""Products of values in 14 bits: LLVM instructions as functions for Numba.

A group of inputs is 16 pairs of codes and their scale, 17 times four bytes; of a block of outputs 17 such lines.
Addresses and strides are in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import llvmlite.ir as ir
import numba
from llvmlite import binding
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from greenloop.decoder.native.instructions import (
    BYTES,
    FLOAT,
    FLOATS,
    INT,
    SHORT,
    VECTOR,
    define_by_rows,
    emit_call,
    emit_prefetch,
    float_at,
    fma_of,
    spread,
    vector_at,
)
from greenloop.decoder.native.layout import GROUP, GROUP_LINES, LEAST, MOST_CODE, OUTPUTS, ROWS

_PAIRS = GROUP // 2
_LINE = OUTPUTS * BYTES
_TURNS = 4
"""Pairs of inputs that are taken at a time."""
_FETCHES = -(-_LINE // 64)
"""Lines of a cache that are fetched while a line of a block is read."""

_INTEGERS = ir.VectorType(SHORT, VECTOR)
_HALVES = ir.VectorType(ir.IntType(16), 2 * VECTOR)


def _features() -> set[str]:
    """Of the processor that Numba compiles for; none are known if it is told."""
    if numba.config.CPU_NAME or numba.config.CPU_FEATURES:
        return set()
    return {name for name, there in binding.get_host_cpu_features().items() if there}


_FEATURES = _features()


def multiplies_pairs() -> bool:
    """Whether the processor multiplies and adds up pairs of 16-bit integers in one instruction, for these vectors."""
    wide = "avx512vnni" in _FEATURES
    return wide if VECTOR == 16 else "avxvnni" in _FEATURES or (wide and "avx512vl" in _FEATURES)


def _dot_of(builder: Any) -> Callable[[Any, Any, Any], Any]:
    """The function sums + x * w over pairs of 16-bit integers, for vectors of 32-bit sums and as many pairs."""
    bits, module = 32 * VECTOR, builder.module
    if multiplies_pairs():
        # The one that saturates, though nothing here is so large: LLVM takes the other one apart.
        kind = ir.FunctionType(_INTEGERS, [_INTEGERS] * 3)
        added = cgutils.get_or_insert_function(module, kind, f"llvm.x86.avx512.vpdpwssds.{bits}")
        return lambda sums, x, weights: builder.call(added, [sums, x, weights])
    name = {256: ("avx2", "llvm.x86.avx2.pmadd.wd"), 512: ("avx512bw", "llvm.x86.avx512.pmaddw.d.512")}[bits]
    if name[0] in _FEATURES:
        kind = ir.FunctionType(_INTEGERS, [_HALVES] * 2)
        pairs = cgutils.get_or_insert_function(module, kind, name[1])
        both = partial(_multiplied_by, builder, pairs)
        return lambda sums, x, weights: builder.add(sums, both(x, weights))
    return lambda sums, x, weights: builder.add(sums, _multiplied(builder, x, weights))


def _multiplied_by(builder: Any, pairs: Any, x: Any, weights: Any) -> Any:
    return builder.call(pairs, [builder.bitcast(x, _HALVES), builder.bitcast(weights, _HALVES)])


def _multiplied(builder: Any, x: Any, weights: Any) -> Any:
    """For processors without such an instruction."""
    half = ir.Constant(_INTEGERS, [16] * VECTOR)
    upper = builder.mul(builder.ashr(x, half), builder.ashr(weights, half))
    x, weights = (builder.ashr(builder.shl(one, half), half) for one in (x, weights))
    return builder.add(upper, builder.mul(x, weights))


@intrinsic
def rounded_tile(
    typing: Any,
    rows: Any,
    x: Any,
    x_stride: Any,
    block: Any,
    groups: Any,
    out: Any,
    out_stride: Any,
    ahead: Any,
    ahead_step: Any,
    start: Any,
    start_stride: Any,
) -> Any:
    """Products of a few rows with one block of outputs, both rounded: integer sums of a group, float32 ones of groups.

    Args:
        rows: at most `ROWS`; none does nothing.
        x: address of the first row's first group.
        x_stride: from a row to the next.
        block: address of [groups, GROUP_LINES, OUTPUTS].
        groups: of inputs, at least 1.
        out: address of the first row's outputs, float32; they hold the sums meanwhile, which no register is left for.
        out_stride: from a row's outputs to the next row's.
        ahead: address of what will be needed next.
        ahead_step: how much of it is fetched while a line of the block is read; 0 fetches one line.
        start: address of the first row's values to which its products are added; 0 for none.
        start_stride: from a row's to the next row's.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit_call(builder, "greenloop_rounded_tile", partial(define_by_rows, ROWS, _emit_tile), arguments)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 11), emit


def _emit_tile(builder: Any, count: int, operands: Sequence[Any]) -> None:
    """The loop over the groups for a fixed number of rows: out[row] += scales * (codes[row] . codes)."""
    x, x_stride, block, groups, out, out_stride, ahead, ahead_step, start, start_stride = operands
    fma, dot = fma_of(builder), _dot_of(builder)
    parts = range(0, OUTPUTS, VECTOR)
    rows = range(count)
    firsts = [_behind(builder, out, out_stride, row) for row in rows]
    outputs = [[vector_at(builder, first, INT(part)) for part in parts] for first in firsts]
    begun = builder.icmp_signed("!=", start, INT(0))
    for row in rows:
        for output, part in zip(outputs[row], parts, strict=True):
            place = vector_at(builder, _behind(builder, start, start_stride, row), INT(part))
            found = builder.load(builder.select(begun, place, output), align=BYTES)
            builder.store(builder.select(begun, found, ir.Constant(FLOATS, [0.0] * VECTOR)), output, align=BYTES)

    def vectors(line: Any) -> list[Any]:
        """A line of the block."""
        return [builder.load(vector_at(builder, line, INT(part)), align=BYTES) for part in parts]

    before, loop, after = builder.block, builder.append_basic_block("group"), builder.append_basic_block("after")
    builder.branch(loop)
    builder.position_at_end(loop)
    group = builder.phi(INT)
    group.add_incoming(INT(0), before)
    lines = _behind(builder, block, INT(GROUP_LINES * _LINE), group)
    values = [_behind(builder, _behind(builder, x, x_stride, row), INT(GROUP_LINES * BYTES), group) for row in rows]
    fetched = _behind(builder, ahead, ahead_step, builder.mul(group, INT(GROUP_LINES)))

    third = builder.udiv(ahead_step, INT(_FETCHES))

    def advance(pair: Any, sums: Sequence[Any]) -> list[Any]:
        """The integer sums with one more pair of inputs."""
        at = _behind(builder, fetched, ahead_step, pair)
        for number in range(_FETCHES):
            emit_prefetch(builder, _behind(builder, at, third, number))
        weights = [builder.bitcast(one, _INTEGERS) for one in vectors(_behind(builder, lines, INT(_LINE), pair))]
        added = []
        for row in rows:
            value = builder.load(builder.gep(builder.inttoptr(values[row], FLOAT.as_pointer()), [pair]), align=BYTES)
            both = builder.bitcast(spread(builder, value), _INTEGERS)
            mine = sums[row * len(parts) : (row + 1) * len(parts)]
            added += [dot(total, both, weight) for weight, total in zip(weights, mine, strict=True)]
        return added

    inner, done = builder.append_basic_block("pairs"), builder.append_basic_block("done")
    builder.branch(inner)
    builder.position_at_end(inner)
    pair, sums = builder.phi(INT), [builder.phi(_INTEGERS) for _ in range(count * len(parts))]
    added: list[Any] = list(sums)
    for turn in range(_TURNS):
        added = advance(builder.add(pair, INT(turn)), added)
    following = builder.add(pair, INT(_TURNS))
    builder.cbranch(builder.icmp_signed("<", following, INT(_PAIRS)), inner, done)
    nothing = ir.Constant(_INTEGERS, [0] * VECTOR)
    for joined, begin, end in zip((pair, *sums), (INT(0), *[nothing] * len(sums)), (following, *added), strict=True):
        joined.add_incoming(begin, loop)
        joined.add_incoming(end, inner)
    builder.position_at_end(done)
    scales = vectors(builder.add(lines, INT(_PAIRS * _LINE)))
    for row in rows:
        scale = spread(builder, builder.load(float_at(builder, values[row], INT(_PAIRS)), align=BYTES))
        mine = added[row * len(parts) : (row + 1) * len(parts)]
        for output, total, factor in zip(outputs[row], mine, scales, strict=True):
            terms = [builder.sitofp(total, FLOATS), builder.fmul(scale, factor), builder.load(output, align=BYTES)]
            builder.store(builder.call(fma, terms), output, align=BYTES)
    then = builder.add(group, INT(1))
    group.add_incoming(then, done)
    builder.cbranch(builder.icmp_signed("<", then, groups), loop, after)
    builder.position_at_end(after)


def _behind(builder: Any, address: Any, stride: Any, count: Any) -> Any:
    """So many strides behind an address."""
    return builder.add(address, builder.mul(stride, INT(count) if isinstance(count, int) else count))


@intrinsic
def round_group(typing: Any, source: Any, target: Any) -> Any:
    """Round a group to codes from -MOST_CODE to MOST_CODE and a scale: the nearest, the largest value at the end.

    Where a value is NaN or infinite the scale is, and so is all that is made of the group.

    Args:
        source: address of GROUP float32.
        target: address of GROUP int16 and a float32.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit_call(builder, "greenloop_round_group", _define_round, arguments)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), emit


def _define_round(function: Any) -> None:
    source, target = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    module, begins = builder.module, range(0, GROUP, VECTOR)
    values = [builder.load(vector_at(builder, source, INT(begin)), align=BYTES) for begin in begins]
    magnitude = ir.Constant(_INTEGERS, [0x7FFFFFFF] * VECTOR)
    # As integers magnitudes have the order that they have as numbers, and NaN is the largest.
    bits = [builder.and_(builder.bitcast(value, _INTEGERS), magnitude) for value in values]
    largest = bits[0]
    for one in bits[1:]:
        largest = builder.select(builder.icmp_unsigned(">", one, largest), one, largest)
    kind = ir.FunctionType(SHORT, [_INTEGERS])
    reduce = cgutils.get_or_insert_function(module, kind, f"llvm.vector.reduce.umax.v{VECTOR}i32")
    most = builder.bitcast(builder.call(reduce, [largest]), FLOAT)
    inverse = builder.fdiv(FLOAT(MOST_CODE), most)
    inverse = builder.select(builder.fcmp_ordered(">", most, FLOAT(LEAST)), inverse, FLOAT(0.0))
    rint = cgutils.get_or_insert_function(module, ir.FunctionType(FLOATS, [FLOATS]), f"llvm.rint.v{VECTOR}f32")
    shorts = ir.VectorType(ir.IntType(16), VECTOR)
    for value, begin in zip(values, begins, strict=True):
        nearest = builder.call(rint, [builder.fmul(value, spread(builder, inverse))])
        codes = builder.trunc(builder.fptosi(nearest, _INTEGERS), shorts)
        place = builder.inttoptr(builder.add(target, INT(begin * 2)), shorts.as_pointer())
        builder.store(codes, place, align=2)
    scale = builder.fmul(most, FLOAT(1.0 / MOST_CODE))
    builder.store(scale, float_at(builder, target, INT(_PAIRS)), align=BYTES)
    builder.ret_void()
