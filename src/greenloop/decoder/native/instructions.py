"""What the building blocks of native code are made of: LLVM's types and instructions, written into a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba.core import cgutils

from greenloop.decoder.native.layout import LANES, OUTPUTS

BYTES = np.dtype(np.float32).itemsize
HALF = BYTES // 2
"""Bytes of a bfloat16 or of a 16-bit integer."""
VECTOR = math.gcd(LANES, OUTPUTS)
"""Values of a vector: as many as one of the processor's has, or a multiple."""

INT, SHORT, FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
FLOATS = ir.VectorType(FLOAT, VECTOR)


def emit_call(builder: Any, name: str, define: Callable[[Any], None], arguments: Sequence[Any]) -> None:
    """Call a function of integers that stands once in a module, defined where it is first called.

    What calls it at several places compiles in a fraction of the time.
    """
    kind = ir.FunctionType(ir.VoidType(), [INT] * len(arguments))
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    if function.is_declaration:
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        define(function)
    builder.call(function, arguments)


def define_by_rows(most: int, emit: Callable[[Any, int, Sequence[Any]], None], function: Any) -> None:
    """Define a function whose first argument says for how many rows, at most so many, it does what `emit` writes.

    Args:
        most: rows.
        emit: takes the builder, the rows and the other arguments.
        function: to be defined.
    """
    rows, *operands = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    after = function.append_basic_block("after")
    switch = builder.switch(rows, after)
    for count in range(1, most + 1):
        case = function.append_basic_block(f"rows_{count}")
        switch.add_case(INT(count), case)
        builder.position_at_end(case)
        emit(builder, count, operands)
        builder.branch(after)
    builder.position_at_end(after)
    builder.ret_void()


def fma_of(builder: Any) -> Any:
    """The function a * b + c of vectors, rounded once."""
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    return cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{VECTOR}f32")


def float_at(builder: Any, address: Any, offset: Any) -> Any:
    """The place so many float32 values behind an address."""
    return builder.gep(builder.inttoptr(address, FLOAT.as_pointer()), [offset])


def vector_at(builder: Any, address: Any, offset: Any) -> Any:
    """The same of a vector that begins there."""
    return builder.bitcast(float_at(builder, address, offset), FLOATS.as_pointer())


def spread(builder: Any, value: Any) -> Any:
    """A vector of the one value."""
    nothing = ir.Constant(FLOATS, ir.Undefined)
    first = builder.insert_element(nothing, value, SHORT(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(SHORT, VECTOR), [0] * VECTOR))


def emit_prefetch(builder: Any, address: Any) -> None:
    """Fetch the line of an address into the second cache; asking beyond the end does no harm."""
    byte = ir.IntType(8).as_pointer()
    function = ir.FunctionType(ir.VoidType(), [byte, SHORT, SHORT, SHORT])
    prefetch = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
    reading, second, data = SHORT(0), SHORT(2), SHORT(1)
    builder.call(prefetch, [builder.inttoptr(address, byte), reading, second, data])
