"""The building blocks of native code that Python cannot express: LLVM instructions as functions for Numba.

Addresses and numbers are 64-bit integers throughout; offsets are in bytes where an address is added to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from greenloop.decoder.native.layout import LANES

TILE = 12 if llvm.get_host_cpu_features().get("avx512f") else 6
"""Rows whose sums are in registers together: 6 x 16 float32 are 12 of the 16 vectors of AVX2."""
BYTES = np.dtype(np.float32).itemsize
LINE = LANES * BYTES
"""Bytes of one input's weights in a block, in float32."""

TURN = 8
"""Rows and columns of what is transposed at once: as many values as a vector of AVX2 has."""

_INT, _SHORT, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)


def _tile(weights_of: Callable[[Any, Any], Any]) -> Any:
    """`tile` for one type of weights."""

    @intrinsic
    def tile(
        typing: Any,
        rows: Any,
        x: Any,
        x_stride: Any,
        block: Any,
        line: Any,
        width: Any,
        out: Any,
        out_stride: Any,
        ahead: Any,
        ahead_step: Any,
        start: Any,
        start_stride: Any,
    ) -> Any:
        """Products of a few rows with one block of 16 outputs, sums in registers.

        The micro-kernel of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008, sec. 5.

        Args:
            rows: at most TILE; none does nothing.
            x: address of the first row's first value, float32.
            x_stride: values from a row to the next.
            block: address of [width, 16] weights.
            line: bytes from an input's 16 weights to the next input's.
            width: inputs, at least 1.
            out: address of the first row's 16 outputs, float32; what was there is lost, unless `start` is there.
            out_stride: values from a row's outputs to the next row's.
            ahead: address of what will be needed next; it is fetched meanwhile.
            ahead_step: bytes of it an input; 0 fetches one line.
            start: address of the first row's 16 values to which its products are added; 0 for none.
            start_stride: values from a row's to the next row's.
        """

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.FunctionType(ir.VoidType(), [_INT] * len(arguments))
            function = cgutils.get_or_insert_function(builder.module, kind, f"greenloop_{weights_of.__name__}_tile")
            if function.is_declaration:
                _define_tile(function, weights_of)
            builder.call(function, arguments)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 12), emit

    return tile


def _define_tile(function: Any, weights_of: Callable[[Any, Any], Any]) -> None:
    """A function of its own, so that what calls it at several places compiles in a fraction of the time."""
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    rows, *operands = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    after = function.append_basic_block("after")
    switch = builder.switch(rows, after)
    for count in range(1, TILE + 1):
        case = function.append_basic_block(f"rows_{count}")
        switch.add_case(_INT(count), case)
        builder.position_at_end(case)
        _emit_tile(builder, weights_of, count, operands)
        builder.branch(after)
    builder.position_at_end(after)
    builder.ret_void()


def _emit_tile(builder: Any, weights_of: Callable[[Any, Any], Any], count: int, operands: Sequence[Any]) -> None:
    """The loop over the inputs for a fixed number of rows: sums[row] += x[row, k] * block[k]."""
    x, x_stride, block, line, width, out, out_stride, ahead, ahead_step, start, start_stride = operands
    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{LANES}f32"
    )
    inputs = [_float_at(builder, x, builder.mul(x_stride, _INT(row))) for row in range(count)]
    outputs = [
        builder.bitcast(_float_at(builder, out, builder.mul(out_stride, _INT(row))), _VECTOR.as_pointer())
        for row in range(count)
    ]
    begun = builder.icmp_signed("!=", start, _INT(0))
    nothing = ir.Constant(_VECTOR, [0.0] * LANES)
    first = []
    for row, output in enumerate(outputs):
        place = builder.bitcast(_float_at(builder, start, builder.mul(start_stride, _INT(row))), _VECTOR.as_pointer())
        # Without a start something must still be read: what stands in the outputs.
        found = builder.load(builder.select(begun, place, output), align=BYTES)
        first.append(builder.select(begun, found, nothing))
    before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("sums")
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(_INT)
    k.add_incoming(_INT(0), before)
    sums = [builder.phi(_VECTOR) for _ in range(count)]
    _emit_prefetch(builder, builder.add(ahead, builder.mul(k, ahead_step)))
    weights = weights_of(builder, builder.add(block, builder.mul(k, line)))
    added = []
    for row, total, begin in zip(inputs, sums, first, strict=True):
        total.add_incoming(begin, before)
        added.append(builder.call(fma, [_spread(builder, builder.load(builder.gep(row, [k]))), weights, total]))
        total.add_incoming(added[-1], loop)
    following = builder.add(k, _INT(1))
    k.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, width), loop, after)
    builder.position_at_end(after)
    for output, total in zip(outputs, added, strict=True):
        builder.store(total, output, align=BYTES)


def _whole(builder: Any, address: Any, count: int = LANES) -> Any:
    """So many float32 weights."""
    return builder.load(builder.inttoptr(address, ir.VectorType(_FLOAT, count).as_pointer()), align=BYTES)


def _half(builder: Any, address: Any, count: int = LANES) -> Any:
    """So many bfloat16 weights: the upper halves of float32."""
    shorts, integers = ir.VectorType(ir.IntType(16), count), ir.VectorType(_SHORT, count)
    read = builder.load(builder.inttoptr(address, shorts.as_pointer()), align=BYTES // 2)
    bits = builder.shl(builder.zext(read, integers), ir.Constant(integers, [16] * count))
    return builder.bitcast(bits, ir.VectorType(_FLOAT, count))


tile = _tile(_whole)
"""Products of a few rows with one block of float32 weights."""
half_tile = _tile(_half)
"""The same for bfloat16 weights."""


def _copied(weights_of: Callable[..., Any]) -> Any:
    """`copied` for one type of weights."""

    @intrinsic
    def copied(typing: Any, source: Any, target: Any) -> Any:
        """Copy 16 weights that stand side by side to float32."""

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, target = arguments
            builder.store(weights_of(builder, source), builder.inttoptr(target, _VECTOR.as_pointer()), align=BYTES)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), emit

    return copied


def _turned(weights_of: Callable[..., Any], size: int) -> Any:
    """`turned` for one type of weights."""

    @intrinsic
    def turned(typing: Any, source: Any, source_stride: Any, target: Any, target_stride: Any) -> Any:
        """Transpose 8 x 8 weights.

        Args:
            source: address of the first.
            source_stride: values from a row to the next.
            target: address of the first, float32.
            target_stride: values from a row to the next there.
        """

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, source_stride, target, target_stride = arguments
            step = builder.mul(source_stride, _INT(size))
            rows = [weights_of(builder, builder.add(source, builder.mul(step, _INT(row))), TURN) for row in range(TURN)]
            for distance in (1, 2, 4):
                # Swap the squares off the diagonal of every square of twice the distance.
                upper = [j if not j & distance else TURN + j - distance for j in range(TURN)]
                lower = [j + distance if not j & distance else TURN + j for j in range(TURN)]
                for row in range(TURN):
                    if not row & distance:
                        pair = rows[row], rows[row + distance]
                        rows[row], rows[row + distance] = (_mixed(builder, *pair, places) for places in (upper, lower))
            for number, row in enumerate(rows):
                place = builder.inttoptr(
                    builder.add(target, builder.mul(target_stride, _INT(number * BYTES))), row.type.as_pointer()
                )
                builder.store(row, place, align=BYTES)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), emit

    return turned


def _mixed(builder: Any, first: Any, second: Any, places: Sequence[int]) -> Any:
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_SHORT, len(places)), list(places)))


copied, half_copied = _copied(_whole), _copied(_half)
"""Copy 16 weights: float32, bfloat16."""
turned, half_turned = _turned(_whole, BYTES), _turned(_half, BYTES // 2)
"""Transpose 8 x 8 weights: float32, bfloat16."""


def _float_at(builder: Any, address: Any, offset: Any) -> Any:
    return builder.gep(builder.inttoptr(address, _FLOAT.as_pointer()), [offset])


def _spread(builder: Any, value: Any) -> Any:
    """A vector of the one value."""
    nothing = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(nothing, value, _SHORT(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(_SHORT, LANES), [0] * LANES))


def _emit_prefetch(builder: Any, address: Any) -> None:
    """Fetch the line of an address into the second cache; asking beyond the end does no harm."""
    byte = ir.IntType(8).as_pointer()
    function = ir.FunctionType(ir.VoidType(), [byte, _SHORT, _SHORT, _SHORT])
    prefetch = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
    reading, second, data = _SHORT(0), _SHORT(2), _SHORT(1)
    builder.call(prefetch, [builder.inttoptr(address, byte), reading, second, data])


@intrinsic
def add_atomically(typing: Any, address: Any, value: Any) -> Any:
    """Add to the integer at an address, for all threads to see; what it was before."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, value = arguments
        return builder.atomic_rmw("add", builder.inttoptr(address, _INT.as_pointer()), value, "seq_cst")

    return types.intp(types.intp, types.intp), emit


@intrinsic
def load_atomically(typing: Any, address: Any) -> Any:
    """The integer at an address as the other threads left it."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _INT.as_pointer())
        return builder.load_atomic(pointer, ordering="acquire", align=8)

    return types.intp(types.intp), emit


@intrinsic
def call(typing: Any, function: Any) -> Any:
    """Call the C function `int (*)(void)` at an address."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.FunctionType(_SHORT, []).as_pointer())
        return builder.sext(builder.call(pointer, []), _INT)

    return types.intp(types.intp), emit


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """An address as a pointer, for `carray`."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), emit


@intrinsic
def power_of_two(typing: Any, exponent: Any) -> Any:
    """2 ** (exponent - 127) as float32, for an int32 exponent in 1..254."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.shl(arguments[0], _SHORT(23)), _FLOAT)

    return types.float32(types.int32), emit


@intrinsic
def widened(typing: Any, bits: Any) -> Any:
    """The float32 of the bfloat16 that a uint16 is the bits of."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(arguments[0], _SHORT), _SHORT(16)), _FLOAT)

    return types.float32(types.uint16), emit
