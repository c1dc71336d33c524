"""Operations on many rows [N, ...] of float32 values, each by itself, for training and sampling on a processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from greenloop.decoder.native.layout import BIN
from greenloop.decoder.native.records import DRAW, SWEEP, place, record
from greenloop.decoder.native.team import available, compiled, run


def reads(weight: Tensor) -> bool:
    """Whether training can go through native code: float32 weights on a processor.

    Bfloat16 is left to those who multiply in it.
    """
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and available()


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of x [N, d]."""
    out = torch.empty(x.shape)
    _sweep("normalise", x, x.shape[1], weight=weight.data_ptr(), eps=eps, out=place(out))
    return out


def normed_back(x: Tensor, weight: Tensor, eps: float, gradient: Tensor, plus: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of x [N, d] again, and `plus` with the gradient of x from that of its norm."""
    again, out = torch.empty(x.shape), torch.empty(x.shape)
    places = {"gradient": place(gradient), "plus": place(plus), "out": place(out), "again": place(again)}
    _sweep("normalise_back", x, x.shape[1], weight=weight.data_ptr(), eps=eps, **places)
    return again, out


def gated(x: Tensor) -> Tensor:
    """silu(gate) * up: [N, 2m] to [N, m]."""
    width = x.shape[1] // 2
    out = torch.empty(len(x), width)
    _sweep("gate", x, width, out=place(out))
    return out


def gated_back(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gated values of x [N, 2m] again, and the gradient of x from that of its gated values [N, m]."""
    width = x.shape[1] // 2
    out, again = torch.empty(x.shape), torch.empty(len(x), width)
    _sweep("gate_back", x, width, gradient=place(gradient), out=place(out), again=place(again))
    return again, out


def judged(logits: Tensor, labels: Tensor, temperature: float, *, slope: bool) -> tuple[Tensor, Tensor]:
    """Log-prob of the labels and entropy under softmax(logits / temperature), [N] nats each.

    Args:
        logits: [N, V]; what they are afterwards depends on `slope`.
        labels: [N] int64.
        temperature: of the sampling.
        slope: the logits become d log-prob / d logits.
    """
    rows, width = logits.shape
    logprob, entropy = torch.empty(rows), torch.empty(rows)
    places = {"logprob": logprob.data_ptr(), "entropy": entropy.data_ptr(), "labels": labels.data_ptr()}
    _sweep("judge_labels", logits, width, temperature=temperature, slope=int(slope), **places)
    return logprob, entropy


def draws_from(logits: Tensor) -> bool:
    """Whether `drawn` can read these [B, V]."""
    return reads(logits) and logits.stride(-1) == 1


def drawn(
    logits: Tensor, uniform: Sequence[float], sources: Sequence[int], temperatures: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Tokens [n] int64 drawn from softmax(logits / temperature), and their log-probs [n].

    Inverse-CDF sampling: a token's weights and those before it hold `uniform` of the sum; none of weight 0 is drawn.
    At temperature 0 it is the likeliest token, the first of several, with its log-prob at temperature 1.

    Args:
        logits: [B, V].
        uniform: [n] in [0, 1).
        sources: [n] the row of each, none before an earlier one's.
        temperatures: [n] of the softmax.
    """
    rows, width = logits.shape
    threads, count = torch.get_num_threads(), len(sources)
    tokens, logprobs = torch.empty(count, dtype=torch.int64), torch.empty(count)
    numbers, heats = np.array(uniform, dtype=np.float64), np.array(temperatures, dtype=np.float64)
    begins = np.searchsorted(np.array(sources), np.arange(rows + 1))
    # The weights, then as many float64 as there are bins.
    size = -(-width // 2) * 2 + 2 * -(-width // BIN)
    scratch, state = torch.empty(threads, size), np.zeros(2, dtype=np.int64)
    one = record(
        DRAW,
        {
            "rows": rows,
            "width": width,
            "x": place(logits),
            "begins": begins.ctypes.data,
            "uniform": numbers.ctypes.data,
            "temperatures": heats.ctypes.data,
            "tokens": tokens.data_ptr(),
            "logprobs": logprobs.data_ptr(),
            "scratch": scratch.data_ptr(),
            "scratch_size": size,
            "entered": state.ctypes.data,
            "taken": state[1:].ctypes.data,
        },
    )
    run(compiled("rows_code").draw_tokens.address, one.ctypes.data, threads)
    return tokens, logprobs


def _sweep(name: str, x: Tensor, width: int, **fields: Any) -> None:
    taken = np.zeros(1, dtype=np.int64)
    one = record(SWEEP, {"rows": len(x), "width": width, "x": place(x), "taken": taken.ctypes.data, **fields})
    run(getattr(compiled("rows_code"), name).address, one.ctypes.data, torch.get_num_threads())
