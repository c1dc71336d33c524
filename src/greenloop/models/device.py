"""Which device computes, and in which precision.

In: the recipe's words (`auto`, `cuda:1`, `bfloat16`). Out: torch's values.
bfloat16 is `auto` only where the hardware multiplies in it: elsewhere it is emulated and slower than float32.
"""

from pathlib import Path

import torch

from greenloop.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FAST_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16"})
CPUINFO = Path("/proc/cpuinfo")


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, or the CPU where there is none.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device: this machine has no {name!r}; use auto, cpu, cuda or cuda:1.") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where `device` computes fast in it, else float32.

    Raises:
        ConfigError: not auto, float32 or bfloat16.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ConfigError(f"dtype: expected auto, float32 or bfloat16 (got {name!r}).")
        return DTYPES[name]
    return torch.bfloat16 if _fast_in_bfloat16(device) else torch.float32


def fast_bfloat16_cpu(cpuinfo: str) -> bool:
    """Whether the text of `/proc/cpuinfo` lists an instruction set that multiplies bfloat16.

    >>> fast_bfloat16_cpu("flags : fpu avx512_bf16 avx2"), fast_bfloat16_cpu("flags : fpu avx512f avx2")
    (True, False)
    """
    return not FAST_BFLOAT16.isdisjoint(cpuinfo.split())


def _fast_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu" and CPUINFO.is_file() and torch._C._has_mkldnn:
        return fast_bfloat16_cpu(CPUINFO.read_text(encoding="utf-8", errors="replace"))
    return False
