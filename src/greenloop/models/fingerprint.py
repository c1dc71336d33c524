"""Content hashes of files that are too big to read at every start.

In: paths. Out: SHA-256 in hex. A hash is remembered in `hashes.json` of the cache folder under the file's path,
size and modification time in nanoseconds; a file changed behind all three is not noticed. Losing `hashes.json` costs
time only.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

MEMORY = "hashes.json"


def file_sha256(path: Path, cache_dir: Path) -> str:
    """SHA-256 of the file's content, from memory if the file has the size and time that it had then."""
    status = path.stat()
    key, stamp = str(path.resolve()), [status.st_size, status.st_mtime_ns]
    remembered = _recall(cache_dir).get(key)
    if isinstance(remembered, dict) and remembered.get("stamp") == stamp:
        return str(remembered["sha256"])
    digest = fresh_sha256(path)
    _remember(cache_dir, key, {"stamp": stamp, "sha256": digest})
    return digest


def fresh_sha256(path: Path) -> str:
    """SHA-256 of the file's content as it is now, read in full."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(paths: Iterable[Path], cache_dir: Path) -> str:
    """One SHA-256 over the names and contents of several files, whatever their order and folder."""
    lines = sorted(f"{path.name} {file_sha256(path, cache_dir)}\n" for path in paths)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _recall(cache_dir: Path) -> dict[str, object]:
    try:
        memory = json.loads((cache_dir / MEMORY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return memory if isinstance(memory, dict) else {}


def _remember(cache_dir: Path, key: str, entry: object) -> None:
    """Two processes at a time may lose one entry, never the file; a cache that cannot be written is not an error."""
    memory = {**_recall(cache_dir), key: entry}
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache_dir, prefix=f".{MEMORY}.", delete=False) as file:
            json.dump(memory, file, indent=1)
        os.replace(file.name, cache_dir / MEMORY)
    except OSError:
        return
