"""The head of a GGUF file, and where its converted form lies in the cache.

In: a `.gguf` file. Out: the few facts that decide, in milliseconds and without torch, whether it can be used.
Knows nothing of tensors; `greenloop.models.convert` has transformers read those.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

import json
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from greenloop.errors import ModelError

FORMAT = 1
"""Of the converted folder; raise it when `convert` writes something else for the same file."""
RECORD = "greenloop.json"
MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
END_TOKENS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What a GGUF file says of itself."""

    architecture: str
    licence: str
    """Empty if it says none."""
    has_chat_template: bool
    end_tokens: tuple[int, ...]
    """Ids of end-of-sequence and end-of-turn, without repetition."""


def read_header(path: Path) -> GgufHeader:
    """The header of a GGUF file.

    Raises:
        ModelError: the file cannot be read, is no GGUF file of version 2 or 3, or ends within its header.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            metadata = _Cursor(content).metadata()
        return _header(metadata)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, struct.error) as error:
        raise ModelError(
            f"{path}: not a GGUF file of version 2 or 3, or cut off within its header; download it again."
        ) from error


def converted_folder(cache_dir: Path, sha256: str) -> Path:
    """Absolute path at which the Hugging Face form of a GGUF file with this content lies, now or once converted."""
    return cache_dir.absolute() / "gguf" / f"{sha256}-{FORMAT}"


def converted_from(folder: Path) -> str | None:
    """SHA-256 of the GGUF file that a complete converted folder was made from; None for any other folder."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return str(record["gguf_sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _header(metadata: dict[str, object]) -> GgufHeader:
    ends = [metadata[key] for key in END_TOKENS if key in metadata]
    return GgufHeader(
        architecture=str(metadata["general.architecture"]),
        licence=str(metadata.get("general.license", "")),
        has_chat_template="tokenizer.chat_template" in metadata,
        end_tokens=tuple(dict.fromkeys(end for end in ends if isinstance(end, int))),
    )


class _Cursor:
    """Walks through the header's keys and values; array values are stepped over."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.position = len(MAGIC)

    def metadata(self) -> dict[str, object]:
        if self.content[: len(MAGIC)] != MAGIC:
            raise ValueError("no magic")
        if self.scalar("<I") not in (2, 3):
            raise ValueError("version")
        self.scalar("<Q")  # tensors
        return dict(self.pair() for _ in range(int(self.scalar("<Q"))))

    def pair(self) -> tuple[str, object]:
        return self.string(), self.value(int(self.scalar("<I")))

    def value(self, kind: int) -> object:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            self.step_over_array()
            return None
        return self.scalar(SCALARS[kind])

    def step_over_array(self) -> None:
        kind, count = int(self.scalar("<I")), int(self.scalar("<Q"))
        if kind in SCALARS:
            self.position += count * struct.calcsize(SCALARS[kind])
            return
        for _ in range(count):
            if kind == ARRAY:
                self.step_over_array()
            else:
                self.step_over_string()

    def step_over_string(self) -> None:
        length = int(self.scalar("<Q"))
        self.position += length

    def string(self) -> str:
        length = int(self.scalar("<Q"))
        self.position += length
        return self.content[self.position - length : self.position].decode("utf-8")

    def scalar(self, layout: str) -> int | float:
        (number,) = struct.unpack_from(layout, self.content, self.position)
        self.position += struct.calcsize(layout)
        assert isinstance(number, int | float)
        return number
