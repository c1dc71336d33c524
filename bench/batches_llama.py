"""Greedy answers by llama.cpp through its Python bindings, many at a time: sequences of one context whose next tokens
are computed together, a waiting prompt taking the place of one that has ended.

In: prompts as token ids. Out: the tokens of each answer, as it ends. Needs `llama-cpp-python`.
"""

from __future__ import annotations

import heapq
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np

BATCH = 2048
"""Tokens computed together at most."""
_ERROR = 4
"""Of ggml's log levels."""


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _say_errors(level: int, text: bytes, _: Any) -> None:
    """All else that llama.cpp says of itself, hundreds of lines, is left out."""
    if level == _ERROR:
        sys.stderr.write(text.decode(errors="replace"))


@dataclass(slots=True)
class _Row:
    """An answer under way."""

    prompt: int
    position: int
    """Of the next token."""
    tokens: list[int] = field(default_factory=list)


class Batches:
    """One context with room for so many sequences."""

    def __init__(self, gguf: Path, *, rows: int, row_tokens: int, threads: int, unified: bool) -> None:
        """Weights loaded, nothing computed.

        Args:
            gguf: the model's file, whose quantised weights are used as they are.
            rows: sequences at a time.
            row_tokens: prompt and answer of the longest.
            threads: to compute with.
            unified: one stream of keys and values for all sequences, of which each token's attention goes over all;
                else each has its own, and those whose numbers follow each other are computed together.
        """
        llama.llama_log_set(_say_errors, None)
        llama.llama_backend_init()
        self._model: Any = llama.llama_model_load_from_file(str(gguf).encode(), llama.llama_model_default_params())
        settings = llama.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = rows * row_tokens, rows
        settings.n_batch, settings.n_ubatch = BATCH, 512
        settings.kv_unified = unified
        settings.n_threads = settings.n_threads_batch = threads
        self._context: Any = self._model and llama.llama_init_from_model(self._model, settings)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot run {gguf} with {rows} rows of {row_tokens} tokens")
        self._memory = llama.llama_get_memory(self._context)
        self._vocabulary = llama.llama_model_get_vocab(self._model)
        self._width = llama.llama_vocab_n_tokens(self._vocabulary)
        self._batch = llama.llama_batch_init(BATCH, 0, 1)
        self._free = list(range(rows))

    def close(self) -> None:
        """Give everything back."""
        llama.llama_batch_free(self._batch)
        llama.llama_free(self._context)
        llama.llama_model_free(self._model)

    def answers(self, prompts: Sequence[Sequence[int]], limit: int) -> Iterator[tuple[int, list[int]]]:
        """(index of the prompt, tokens with the end token if it came) of each answer of at most `limit` tokens."""
        waiting = deque(range(len(prompts)))
        rows: dict[int, _Row] = {}
        while waiting or rows:
            scored: dict[int, int] = {}
            self._batch.n_tokens = 0
            for sequence, row in sorted(rows.items()):
                scored[sequence] = self._put([row.tokens[-1]], row.position, sequence)
                row.position += 1
            while waiting and self._free and self._batch.n_tokens + len(prompts[waiting[0]]) <= BATCH:
                sequence, prompt = heapq.heappop(self._free), waiting.popleft()
                rows[sequence] = _Row(prompt, len(prompts[prompt]))
                scored[sequence] = self._put(prompts[prompt], 0, sequence)
            status = llama.llama_decode(self._context, self._batch)
            if status:
                raise RuntimeError(f"llama_decode ended with status {status}")
            for sequence, place in scored.items():
                row = rows[sequence]
                logits = llama.llama_get_logits_ith(self._context, place)
                token = int(np.ctypeslib.as_array(logits, (self._width,)).argmax())
                row.tokens.append(token)
                if llama.llama_vocab_is_eog(self._vocabulary, token) or len(row.tokens) == limit:
                    llama.llama_memory_seq_rm(self._memory, sequence, -1, -1)
                    heapq.heappush(self._free, sequence)
                    yield rows.pop(sequence).prompt, row.tokens

    def _put(self, tokens: Sequence[int], position: int, sequence: int) -> int:
        """Add tokens to the batch; the place of the last one, whose logits are wanted."""
        for offset, token in enumerate(tokens):
            place = self._batch.n_tokens
            self._batch.token[place], self._batch.pos[place] = token, position + offset
            self._batch.n_seq_id[place], self._batch.seq_id[place][0] = 1, sequence
            self._batch.logits[place] = offset == len(tokens) - 1
            self._batch.n_tokens = place + 1
        last: int = self._batch.n_tokens - 1
        return last
