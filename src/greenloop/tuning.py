"""Settings of this process that make torch fast on a CPU. Knows nothing of models."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

import torch

from greenloop.errors import ConfigError

PRECISIONS = ("highest", "high")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1
_MADV_HUGEPAGE, _HUGE_PAGE = 14, 2**21


def prepare_process(matmul_precision: str = "highest") -> None:
    """Use every core, and let glibc keep freed memory, in large pages.

    glibc gives large tensors back to the kernel when they are freed and takes them again at the next step: a third of a
    training step's CPU time was the kernel's. With no mmap threshold and no trimming the memory is reused. So all of it
    comes from one range of addresses, for which the kernel is asked for pages of 2 MiB: where every page has 4 KiB, a
    processor looks up pages all the time that it reads weights.

    Args:
        matmul_precision: of products of float32 values, for `torch.set_float32_matmul_precision`.

    Raises:
        ConfigError: not highest or high.
    """
    if matmul_precision not in PRECISIONS:
        raise ConfigError(f"matmul_precision: expected highest or high (got {matmul_precision!r}).")
    torch.set_float32_matmul_precision(matmul_precision)
    torch.set_num_threads(cores())
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
        _ask_for_large_pages(libc)


def _ask_for_large_pages(libc: ctypes.CDLL) -> None:
    """For what will be allocated, of up to half of this machine's memory; without effect where there are none.

    Addresses that nobody writes to take no memory.
    """
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    begin = libc.malloc(size)
    if begin is None:
        return
    first = -(-begin // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(first, (begin + size - first) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
    libc.free(begin)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """What the machine calls its processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
