"""From a GGUF file to an ordinary Hugging Face folder, once.

In: a file and the folder to make. Out: that folder with safetensors, config, tokenizer and generation config.

The weights are stored in float32, bit for bit what transformers dequantises: a Q4_1 weight is an fp16 scale times a
4-bit integer plus an fp16 minimum, which bfloat16 would round. The price is disk (four bytes a weight).
A process that is killed meanwhile leaves a `.partial` folder that nobody takes for the result and the next one removes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from greenloop.errors import ModelError
from greenloop.models.gguf import FORMAT, RECORD, converted_from, read_header
from greenloop.models.quiet import without_progress_bars

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


def convert(gguf: Path, sha256: str, folder: Path) -> None:
    """Make `folder` from the GGUF file unless it is there; of several processes one converts and the others wait.

    Args:
        gguf: The file.
        sha256: Of its content.
        folder: `converted_folder(cache_dir, sha256)`.

    Raises:
        ModelError: transformers cannot read the file, or the folder cannot be written.
    """
    if converted_from(folder):
        return
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder.with_name(f".{folder.name}.lock")):
            if not converted_from(folder):
                _fill(partial, gguf, sha256)
                os.rename(partial, folder)
    except OSError as error:
        raise ModelError(
            f"{gguf}: cannot be converted into {folder.parent} ({error.strerror or error}); "
            "free some space there or choose another cache folder."
        ) from error


@contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fill(partial: Path, gguf: Path, sha256: str) -> None:
    """Write everything into `partial`; the record comes last."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with without_progress_bars():
            _write_model(partial, gguf)
        record = {"format": FORMAT, "gguf_sha256": sha256, "gguf_name": gguf.name}
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        _to_disk(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_model(partial: Path, gguf: Path) -> None:
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    try:
        model = _read(gguf)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, local_files_only=True)
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"{gguf}: transformers cannot read this GGUF file ({_first_line(error)}); "
            "download it again, or give the model as a Hugging Face folder."
        ) from error
    try:
        model.save_pretrained(str(partial))
        tokenizer.save_pretrained(str(partial))
    except SafetensorError as error:
        raise OSError(_first_line(error)) from error


def _read(gguf: Path) -> PreTrainedModel:
    """The dense float32 model; `save_pretrained` refuses the one that transformers returns, so it is rebuilt."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    # Newer releases can keep GGUF blocks packed and must be told not to.
    packing = {"quantization_config": transformers.GgufConfig(dequantize=True)} if _knows_packing() else {}
    read = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, local_files_only=True, **packing
    )
    config = type(read.config).from_dict(_unquantised(read.config.to_dict()))
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    dense.load_state_dict(read.state_dict(), assign=True)
    dense.tie_weights()
    dense.generation_config = _generation_config(read.generation_config, read_header(gguf).end_tokens)
    return dense


def _knows_packing() -> bool:
    import transformers

    return hasattr(transformers, "GgufConfig")


def _unquantised(config: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _generation_config(read: GenerationConfig, end_tokens: tuple[int, ...]) -> GenerationConfig:
    """With every end token that the file declares, transformers' own included."""
    from transformers import GenerationConfig

    known = read.eos_token_id if isinstance(read.eos_token_id, list) else [read.eos_token_id]
    ends = list(dict.fromkeys(end for end in (*known, *end_tokens) if end is not None))
    eos = ends[0] if len(ends) == 1 else ends or None
    return GenerationConfig(bos_token_id=read.bos_token_id, eos_token_id=eos, pad_token_id=read.pad_token_id)


def _to_disk(folder: Path) -> None:
    """A power cut after the rename must not leave a complete name over empty files."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
