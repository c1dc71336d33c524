"""Files that appear whole or not at all. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

from greenloop.errors import RunError


def write_atomically(path: Path, text: str) -> None:
    """Write all of `text` or nothing.

    Raises:
        RunError: the file cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
