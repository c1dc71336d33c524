"""Settings of this process that make torch fast on a CPU. Knows nothing of models."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def prepare_process() -> None:
    """Use every core, and let glibc keep freed memory.

    glibc gives large tensors back to the kernel when they are freed and takes them again at the next step: a third of a
    training step's CPU time was the kernel's. With no mmap threshold and no trimming the memory is reused.
    """
    torch.set_num_threads(cores())
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


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
