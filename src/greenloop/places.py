"""Where things of this machine lie, by the environment. Knows nothing of what is kept there."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Converted and pulled models: `GREENLOOP_CACHE_DIR`, or `greenloop` in the user's cache folder."""
    named = os.environ.get("GREENLOOP_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(base) / "greenloop"


def data_dir() -> Path | None:
    """Data sets' own files: `GREENLOOP_DATA_DIR`; None asks the hub."""
    named = os.environ.get("GREENLOOP_DATA_DIR")
    return Path(named) if named else None
