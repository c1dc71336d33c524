"""The building blocks of native code that Python cannot express: LLVM instructions as functions for Numba.

Addresses and numbers are 64-bit integers throughout; offsets are in bytes where an address is added to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from greenloop.decoder.native.instructions import (
    BYTES,
    FLOAT,
    FLOATS,
    HALF,
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
from greenloop.decoder.native.layout import BESIDE, FETCHES, FLAT, GROUP, LANES, OUTPUTS, ROWS, TILE

LINE = LANES * BYTES
"""Bytes of one input's 16 values in a block of attention, in float32."""
WEIGHTS = OUTPUTS * BYTES
"""Bytes of one input's weights in a block, in float32."""

TURN = 8
"""Rows and columns of what is transposed at once: as many values as a vector of AVX2 has."""
QUARTET = 4
"""Rows and columns of what is transposed at once when rows are packed."""

STRIDE = 4
"""Inputs that are taken at a time where something is fetched meanwhile: `FETCHES` lines of it."""


@dataclass(frozen=True, slots=True)
class _Form:
    """Of a tile."""

    weights_of: Callable[..., Any]
    """Reads weights of one type."""
    most: int
    """Rows."""
    lanes: int
    """Outputs of a block."""
    beside: int = 1
    """Blocks that are taken together."""
    packed: bool = False
    """Whether an input of all rows stands side by side."""
    fetching: bool = False
    """Whether something is fetched meanwhile."""

    @property
    def name(self) -> str:
        """Of all that the code depends on: LLVM takes functions of one name for the same."""
        flags = f"{int(self.packed)}_{int(self.fetching)}"
        return f"greenloop{self.weights_of.__name__}_tile_{self.most}_{self.lanes}_{self.beside}_{flags}"


def _tile(form: _Form) -> Any:
    """`tile` in one form."""

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
        apart: Any,
    ) -> Any:
        """Products of a few rows with one block of outputs, or several side by side, sums in registers.

        The micro-kernel of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008, sec. 5.

        Args:
            rows: at most as many as the tile has; none does nothing.
            x: address of the first row's first value, float32.
            x_stride: values from a row to the next; if they are packed, from an input of all rows to the next input.
            block: address of [width, lanes] weights.
            line: bytes from an input's weights to the next input's.
            width: inputs, at least 1.
            out: address of the first row's outputs, float32; what was there is lost, unless `start` is there.
            out_stride: values from a row's outputs to the next row's.
            ahead: address of what will be needed next; a tile that fetches fetches it meanwhile.
            ahead_step: bytes of it an input; 0 fetches one line.
            start: address of the first row's values to which its products are added; 0 for none.
            start_stride: values from a row's to the next row's.
            apart: bytes from a block to the next of those that are taken together.
        """

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            emit_call(builder, form.name, partial(define_by_rows, form.most, partial(_emit_tile, form)), arguments)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 13), emit

    return tile


def _emit_tile(form: _Form, builder: Any, count: int, operands: Sequence[Any]) -> None:
    """The loop over the inputs for a fixed number of rows: sums[row] += x[row, k] * block[k]."""
    x, x_stride, block, line, width, out, out_stride, ahead, ahead_step, start, start_stride, apart = operands
    fma, packed = fma_of(builder), form.packed
    parts = range(0, form.lanes * form.beside, VECTOR)
    inputs = [float_at(builder, x, INT(row) if packed else builder.mul(x_stride, INT(row))) for row in range(count)]
    outputs = [
        vector_at(builder, out, builder.add(builder.mul(out_stride, INT(row)), INT(part)))
        for row in range(count)
        for part in parts
    ]
    begun = builder.icmp_signed("!=", start, INT(0))
    first = []
    for row in range(count):
        for number, part in enumerate(parts):
            place = vector_at(builder, start, builder.add(builder.mul(start_stride, INT(row)), INT(part)))
            # Without a start something must still be read: what stands in the outputs.
            found = builder.load(builder.select(begun, place, outputs[row * len(parts) + number]), align=BYTES)
            first.append(builder.select(begun, found, ir.Constant(FLOATS, [0.0] * VECTOR)))

    def advance(k: Any, sums: Sequence[Any]) -> list[Any]:
        """The sums with one more input."""
        at = builder.add(block, builder.mul(k, line))
        blocks = [builder.add(at, builder.mul(apart, INT(number))) if number else at for number in range(form.beside)]
        weights = [form.weights_of(builder, blocks[part // form.lanes], VECTOR, part % form.lanes) for part in parts]
        offset = builder.mul(k, x_stride) if packed else k
        added = []
        for row, values in enumerate(inputs):
            value = spread(builder, builder.load(builder.gep(values, [offset])))
            mine = sums[row * len(parts) : (row + 1) * len(parts)]
            added += [builder.call(fma, [value, weight, total]) for weight, total in zip(weights, mine, strict=True)]
        return added

    def loop_to(end: Any, k: Any, sums: Sequence[Any], stride: int) -> tuple[Any, list[Any]]:
        """So many inputs at a time while they are before the end; nothing if there are none."""
        before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.cbranch(builder.icmp_signed("<", k, end), loop, after)
        builder.position_at_end(loop)
        number, totals = builder.phi(INT), [builder.phi(FLOATS) for _ in sums]
        added: list[Any] = list(totals)
        for turn in range(stride):
            if stride > 1 and turn % (stride // FETCHES) == 0:
                emit_prefetch(builder, builder.add(ahead, builder.mul(builder.add(number, INT(turn)), ahead_step)))
            added = advance(builder.add(number, INT(turn)), added)
        following = builder.add(number, INT(stride))
        builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
        builder.position_at_end(after)
        last, found = builder.phi(INT), [builder.phi(FLOATS) for _ in sums]
        for joined, begin, end_value in zip((number, *totals), (k, *sums), (following, *added), strict=True):
            joined.add_incoming(begin, before)
            joined.add_incoming(end_value, loop)
        for joined, begin, end_value in zip((last, *found), (k, *sums), (following, *added), strict=True):
            joined.add_incoming(begin, before)
            joined.add_incoming(end_value, loop)
        return last, found

    k, sums = INT(0), first
    if form.fetching:
        k, sums = loop_to(builder.and_(width, INT(-STRIDE)), k, sums, STRIDE)
    _, sums = loop_to(width, k, sums, 1)
    for output, total in zip(outputs, sums, strict=True):
        builder.store(total, output, align=BYTES)


def _whole(builder: Any, address: Any, count: int, begin: int = 0) -> Any:
    """So many float32 weights, from one of those at an address on."""
    at = builder.add(address, INT(begin * BYTES))
    return builder.load(builder.inttoptr(at, ir.VectorType(FLOAT, count).as_pointer()), align=BYTES)


def _sixteen(builder: Any, address: Any, count: int, begin: int) -> Any:
    """So many values of 16 bits."""
    at = builder.add(address, INT(begin * HALF))
    return builder.load(builder.inttoptr(at, ir.VectorType(ir.IntType(16), count).as_pointer()), align=HALF)


def _half(builder: Any, address: Any, count: int, begin: int = 0) -> Any:
    """So many bfloat16 weights: the upper halves of float32."""
    integers = ir.VectorType(SHORT, count)
    read = _sixteen(builder, address, count, begin)
    bits = builder.shl(builder.zext(read, integers), ir.Constant(integers, [16] * count))
    return builder.bitcast(bits, ir.VectorType(FLOAT, count))


def _short(builder: Any, address: Any, count: int, begin: int = 0) -> Any:
    """So many 16-bit integers as float32."""
    read = _sixteen(builder, address, count, begin)
    return builder.sitofp(builder.sext(read, ir.VectorType(SHORT, count)), ir.VectorType(FLOAT, count))


tile = _tile(_Form(_whole, TILE, LANES))
"""Products of a few rows with one block of 16 float32 outputs."""
flat_tile = _tile(_Form(_whole, FLAT, LANES, beside=BESIDE))
"""Products of fewer rows with several such blocks: fewer values are read for a sum."""
short_tile, flat_short_tile = _tile(_Form(_short, TILE, LANES)), _tile(_Form(_short, FLAT, LANES, beside=BESIDE))
"""Both for blocks of 16-bit integers."""
plain_tile = _tile(_Form(_whole, ROWS, OUTPUTS))
"""Products of a few rows with one block of float32 weights."""
low_tile = _tile(_Form(_whole, ROWS, LANES, packed=True))
"""Products of a few packed rows with one block of 16 float32 weights."""
packed_tile = _tile(_Form(_whole, ROWS, OUTPUTS, packed=True))
"""Products of a few packed rows with one block of float32 weights."""
whole_tile = _tile(_Form(_whole, ROWS, OUTPUTS, packed=True, fetching=True))
"""The same, and something is fetched."""
half_tile = _tile(_Form(_half, ROWS, OUTPUTS, packed=True, fetching=True))
"""The same for bfloat16 weights."""


def _widening(bits: int) -> Any:
    """`widen` for codes of so many bits."""
    name = f"greenloop_widen_{bits}"

    @intrinsic
    def widen(typing: Any, codes: Any, scales: Any, offsets: Any, target: Any) -> Any:
        """code * scale + offset for the inputs of a group, rounded once.

        Args:
            codes: address of [GROUP * bits / 8, OUTPUTS] bytes; with 4 bits the first of two inputs is the low half.
            scales: address of [OUTPUTS] float32.
            offsets: address of [OUTPUTS] float32.
            target: address of [GROUP, OUTPUTS] float32.
        """

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            emit_call(builder, name, partial(_define_widen, bits), arguments)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), emit

    return widen


def _define_widen(bits: int, function: Any) -> None:
    codes, scales, offsets, target = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    integers, fma = ir.VectorType(SHORT, VECTOR), fma_of(builder)
    bytes_read = ir.VectorType(ir.IntType(8), VECTOR).as_pointer()
    half, low = (ir.Constant(integers, [value] * VECTOR) for value in (4, 15))
    for part in range(0, OUTPUTS, VECTOR):
        scale, offset = (builder.load(vector_at(builder, at, INT(part)), align=BYTES) for at in (scales, offsets))
        for line in range(GROUP * bits // 8):
            at = builder.add(codes, INT(line * OUTPUTS + part))
            read = builder.load(builder.inttoptr(at, bytes_read), align=1)
            if bits == 4:
                both = builder.zext(read, integers)
                numbers = [builder.and_(both, low), builder.lshr(both, half)]
            else:
                numbers = [builder.sext(read, integers)]
            for turn, number in enumerate(numbers):
                weight = builder.call(fma, [builder.sitofp(number, FLOATS), scale, offset])
                place = vector_at(builder, target, INT((line * len(numbers) + turn) * OUTPUTS + part))
                builder.store(weight, place, align=BYTES)
    builder.ret_void()


widen_halves, widen_bytes = _widening(4), _widening(8)
"""Float32 weights from codes of 4 and of 8 bits."""


def _copied(weights_of: Callable[..., Any]) -> Any:
    """`copied` for one type of weights."""

    @intrinsic
    def copied(typing: Any, source: Any, target: Any) -> Any:
        """Copy a block's outputs of one input, which stand side by side, to float32."""

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, target = arguments
            for begin in range(0, OUTPUTS, VECTOR):
                read = weights_of(builder, source, VECTOR, begin)
                builder.store(read, vector_at(builder, target, INT(begin)), align=BYTES)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), emit

    return copied


def _turned(weights_of: Callable[..., Any], size: int, side: int = TURN) -> Any:
    """`turned` for one type of weights and so many rows and columns."""

    @intrinsic
    def turned(typing: Any, source: Any, source_stride: Any, target: Any, target_stride: Any) -> Any:
        """Transpose side x side weights.

        Args:
            source: address of the first.
            source_stride: values from a row to the next.
            target: address of the first, float32.
            target_stride: values from a row to the next there.
        """

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, source_stride, target, target_stride = arguments
            step = builder.mul(source_stride, INT(size))
            rows = [weights_of(builder, builder.add(source, builder.mul(step, INT(row))), side) for row in range(side)]
            distance = 1
            while distance < side:
                # Swap the squares off the diagonal of every square of twice the distance.
                upper = [j if not j & distance else side + j - distance for j in range(side)]
                lower = [j + distance if not j & distance else side + j for j in range(side)]
                for row in range(side):
                    if not row & distance:
                        pair = rows[row], rows[row + distance]
                        rows[row], rows[row + distance] = (_mixed(builder, *pair, places) for places in (upper, lower))
                distance *= 2
            for number, row in enumerate(rows):
                place = builder.inttoptr(
                    builder.add(target, builder.mul(target_stride, INT(number * BYTES))), row.type.as_pointer()
                )
                builder.store(row, place, align=BYTES)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), emit

    return turned


def _mixed(builder: Any, first: Any, second: Any, places: Sequence[int]) -> Any:
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(SHORT, len(places)), list(places)))


copied, half_copied = _copied(_whole), _copied(_half)
"""Copy the weights of a block's outputs: float32, bfloat16."""
turned, half_turned = _turned(_whole, BYTES), _turned(_half, HALF)
"""Transpose 8 x 8 weights: float32, bfloat16."""
interleaved = _turned(_whole, BYTES, QUARTET)
"""Transpose 4 x 4 values."""


@intrinsic
def add_atomically(typing: Any, address: Any, value: Any) -> Any:
    """Add to the integer at an address, for all threads to see; what it was before."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, value = arguments
        return builder.atomic_rmw("add", builder.inttoptr(address, INT.as_pointer()), value, "seq_cst")

    return types.intp(types.intp, types.intp), emit


@intrinsic
def load_atomically(typing: Any, address: Any) -> Any:
    """The integer at an address as the other threads left it."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], INT.as_pointer())
        return builder.load_atomic(pointer, ordering="acquire", align=8)

    return types.intp(types.intp), emit


@intrinsic
def call(typing: Any, function: Any) -> Any:
    """Call the C function `int (*)(void)` at an address."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.FunctionType(SHORT, []).as_pointer())
        return builder.sext(builder.call(pointer, []), INT)

    return types.intp(types.intp), emit


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """An address as a pointer, for `carray`."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), emit


@intrinsic
def larger(typing: Any, first: Any, second: Any) -> Any:
    """The larger of two float32 values; where one is NaN either, so that a loop of these becomes vectors."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flags = ("nnan", "nsz")
        return builder.select(builder.fcmp_ordered(">", *arguments, flags=flags), *arguments, flags=flags)

    return types.float32(types.float32, types.float32), emit


@intrinsic
def power_of_two(typing: Any, exponent: Any) -> Any:
    """2 ** (exponent - 127) as float32, for an int32 exponent in 1..254."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.shl(arguments[0], SHORT(23)), FLOAT)

    return types.float32(types.int32), emit


@intrinsic
def widened(typing: Any, bits: Any) -> Any:
    """The float32 of the bfloat16 that a uint16 is the bits of."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(arguments[0], SHORT), SHORT(16)), FLOAT)

    return types.float32(types.uint16), emit
