"""What one program may use before it is stopped."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bounds of one program, all of its tests included."""

    cpu_s: float = 3.0
    """CPU time of the process, all threads; the parent reads the kernel's clock of it."""
    wall_s: float = 10.0
    """Real time since the process started; only sleepers meet it."""
    memory_mib: int = 512
    """Address space (RLIMIT_AS)."""
    file_bytes: int = 0
    """Size of any file that the program writes; 0 lets it create empty files only."""
    open_files: int = 32

    def __post_init__(self) -> None:
        """Refuse what no program could run under.

        Raises:
            ValueError: a limit is not a positive finite number (`file_bytes` may be 0).
        """
        for name in ("cpu_s", "wall_s", "memory_mib", "open_files"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        if self.file_bytes < 0:
            raise ValueError(f"file_bytes must be 0 or more, not {self.file_bytes!r}")

    def scaled(self, factor: float) -> Limits:
        """The same limits with `factor` times the time.

        >>> Limits(cpu_s=3.0, wall_s=10.0).scaled(2).cpu_s
        6.0
        """
        return replace(self, cpu_s=self.cpu_s * factor, wall_s=self.wall_s * factor)
