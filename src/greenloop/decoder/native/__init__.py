"""Machine code for a processor, made by LLVM through Numba for the vectors that it has.

A decode step multiplies a few rows by every weight of the model, so it lasts as long as reading the weights does, if
nothing else is in the way: library products that read them at a third of the memory's rate, and a thousand calls of
small operations. Here both are left out (`Step`). An update multiplies many rows, so it lasts as long as its products;
`sums` and `attention` make them from the one copy of the weights, and `rows` leaves out the passes between them.
Nothing is compiled at installation; where Numba or PyTorch's own team of threads is missing, `available` says so and
PyTorch's operations do the work.
"""

from greenloop.decoder.native.layout import LANES, blocks_of
from greenloop.decoder.native.narrow import Narrow, narrow_of
from greenloop.decoder.native.product import Product, lays_out
from greenloop.decoder.native.rounded import Rounded, rounds
from greenloop.decoder.native.rows import reads
from greenloop.decoder.native.step import Step, fits
from greenloop.decoder.native.strips import Strips, Targets
from greenloop.decoder.native.team import available

__all__ = [
    "LANES",
    "Narrow",
    "Product",
    "Rounded",
    "Step",
    "Strips",
    "Targets",
    "available",
    "blocks_of",
    "fits",
    "lays_out",
    "narrow_of",
    "reads",
    "rounds",
]
