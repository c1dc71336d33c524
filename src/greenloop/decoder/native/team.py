"""The threads that run native code: PyTorch's own.

A second team would fight PyTorch's for the cores, because threads of OpenMP wait for their next work without sleeping.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch


def available() -> bool:
    """Whether this process can make and run native code."""
    return importlib.util.find_spec("numba") is not None and _openmp() is not None


def run(function: int, argument: int) -> None:
    """Call the C function `void (*)(void *)` at an address with one argument, in all threads at once.

    Args:
        function: the address of the function.
        argument: the address that every thread is given.
    """
    openmp = _openmp()
    assert openmp is not None, "available was not asked"
    openmp.GOMP_parallel(function, argument, torch.get_num_threads(), 0)


def team_size() -> int:
    """Address of `int omp_get_num_threads()`: how many threads run the function that calls it."""
    return ctypes.cast(_openmp().omp_get_num_threads, ctypes.c_void_p).value or 0


def give_way() -> int:
    """Address of `int sched_yield()`."""
    return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0


@functools.cache
def _openmp() -> Any:
    """The OpenMP runtime that PyTorch has loaded, if it answers to `GOMP_parallel`.

    That is the entry that GCC compiles a parallel region to (libgomp's ABI); LLVM's runtime has it as well.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return None
    site = str(Path(torch.__file__).parents[1])
    loaded = {fields[-1] for line in maps.splitlines() if len(fields := line.split()) > 5}
    for path in sorted(path for path in loaded if path.startswith(site) and "omp" in Path(path).name):
        library = ctypes.CDLL(path)
        if hasattr(library, "GOMP_parallel"):
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            return library
    return None
