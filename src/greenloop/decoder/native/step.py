"""A decode step of all rows as one call into native code.

In: a decoder whose weights are laid out, and the keys and values of the rows in flight. Out: logits. The same
mathematics as `Decoder.forward` over the same keys; all that is not a weight is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from greenloop.decoder.native.layout import LANES, OUTPUTS, PHASES, ROWS, SHEET, whole_blocks
from greenloop.decoder.native.product import lays_out
from greenloop.decoder.native.records import LAYER, STEP, record
from greenloop.decoder.native.strips import Strips
from greenloop.decoder.native.team import compiled, meeting, run

if TYPE_CHECKING:
    from greenloop.decoder.linear import FusedLinear
    from greenloop.decoder.stack import Decoder

CHUNK = 4
"""Rows of one prompt that a thread takes together in attention."""


class Cache(Protocol):
    """Keys and values of the rows in flight."""

    prompts: Strips
    own: Strips


def fits(decoder: Decoder) -> bool:
    """Whether `Step` computes this decoder: weights that it reads, no norms of heads, biases on q, k, v alone."""
    linears = [linear for layer in decoder.layers for linear in layer.linears]
    norms = [norm for layer in decoder.layers for norm in (layer.input_norm, layer.mlp_norm)]
    return (
        decoder.head_width % LANES == 0
        and all(lays_out(linear.weight) for linear in (*linears, decoder.lm_head))
        and all(layer.query_norm is None and layer.key_norm is None for layer in decoder.layers)
        and all(linear.bias is None for layer in decoder.layers for linear in (*layer.linears[1:], decoder.lm_head))
        and all(norm.eps == decoder.norm.eps for norm in norms)
    )


class Step:
    """Decode steps over one cache, with the weights as they are now."""

    def __init__(self, decoder: Decoder, cache: Cache) -> None:
        """Plan for a decoder that `fits` and is packed."""
        self.decoder, self.cache, self._function = decoder, cache, compiled().step.address
        self._threads = torch.get_num_threads()
        rows, heads, width = cache.own.k.shape[1], decoder.heads * decoder.head_width, decoder.inner_width
        hidden = decoder.head.shape[1]
        linears = [linear for layer in decoder.layers for linear in layer.linears]
        low = max(whole_blocks(linear.rank, LANES) for linear in linears)
        qkv = heads + 2 * decoder.kv_heads * decoder.head_width
        widths = {
            "hidden": hidden,
            "normed": hidden + low,
            "qkv": whole_blocks(qkv),
            "mixed": heads + low,
            "gate_up": whole_blocks(2 * width),
            "gated": width + low,
            "change": whole_blocks(hidden),
        }
        self._buffers = {name: torch.zeros(rows, size) for name, size in widths.items()}
        self._packed = torch.zeros(-(-rows // ROWS) * ROWS * (max(hidden, heads, width) + low))
        group = decoder.heads // decoder.kv_heads
        # The queries of a chunk, their scores, and two results of attention; or a sheet of weights.
        attention = CHUNK * group * (3 * decoder.head_width + cache.prompts.places + cache.own.places) + LANES
        scratch = max(attention, SHEET * OUTPUTS)
        self._scratch = torch.zeros(self._threads, scratch)
        self._biases = [None if layer.qkv.bias is None else layer.qkv.bias.float() for layer in decoder.layers]
        self._layers = self._layer_records()
        # The records hold addresses: a `refresh` of the decoder meanwhile must not free what they point to.
        every = (*linears, decoder.lm_head)
        self._weights = [(linear.blocks, linear.up_blocks, _low_blocks(linear), linear.narrow) for linear in every]
        self._taken = np.zeros(PHASES * len(decoder.layers) + 2, dtype=np.int64)
        self._met = np.zeros(2, dtype=np.int64)
        fields = {
            "layers": self._layers.ctypes.data,
            "layer_count": len(decoder.layers),
            **{name: {"at": buffer.data_ptr(), "stride": buffer.shape[1]} for name, buffer in self._buffers.items()},
            "packed": self._packed.data_ptr(),
            "width": hidden,
            "inner": width,
            "heads": group,
            "kv_heads": decoder.kv_heads,
            "head_width": decoder.head_width,
            "eps": decoder.norm.eps,
            "scale": decoder.scale,
            "norm": decoder.norm.weight.data_ptr(),
            "head": _linear(decoder.lm_head),
            "scratch": self._scratch.data_ptr(),
            "scratch_size": scratch,
            "kept_layer": 0 if decoder.traces is None else decoder.traces.layer_size,
            "kept_rounded": int(decoder.traces is not None and decoder.traces.rounds),
            "counts": self._taken.ctypes.data,
            "entered": self._met[1:].ctypes.data,
            **meeting(self._met.ctypes.data),
        }
        self._record = record(STEP, fields)

    def logits(
        self,
        tokens: Sequence[int],
        own: Sequence[int],
        slots: Sequence[int],
        prompts: Sequence[int],
        kept: np.ndarray | None = None,
    ) -> Tensor:
        """The logits after the rows' last tokens, whose keys and values go into the cache.

        Args:
            tokens: [B] last token of each row.
            own: [B] tokens in each row's strip before.
            slots: [B] slot of each row's prompt.
            prompts: [slots in use] tokens of each prompt.
            kept: int64 [B] addresses for the rows' values (`Traces.addresses`).

        Returns:
            [B, V] float32.
        """
        decoder, rows = self.decoder, len(tokens)
        self._buffers["hidden"][:rows] = decoder.embed(torch.tensor(tokens))
        lengths, at = np.array(prompts), np.array(slots)
        before, order = np.array(own), np.argsort(at, kind="stable")
        cos, sin = (angle.float() for angle in decoder.rotary(torch.from_numpy(lengths[at] + before)))
        chunks = _chunks(at[order])
        vocabulary = decoder.head.shape[0]
        logits = torch.empty(rows, whole_blocks(vocabulary))
        self._taken.fill(0)
        self._met.fill(0)
        one = self._record
        one["rows"], one["chunk_count"] = rows, len(chunks)
        one["cos"], one["sin"] = cos.data_ptr(), sin.data_ptr()
        arrays = {"own": before, "order": order, "chunks": chunks, "prompts": lengths}
        for name, array in arrays.items():
            one[name] = array.ctypes.data
        one["kept"] = 0 if kept is None else kept.ctypes.data
        one["logits"]["at"], one["logits"]["stride"] = logits.data_ptr(), logits.shape[1]
        run(self._function, one.ctypes.data, self._threads)
        return logits[:, :vocabulary]

    def _layer_records(self) -> np.ndarray:
        records = np.zeros(len(self.decoder.layers), dtype=LAYER)
        for number, layer in enumerate(self.decoder.layers):
            bias = self._biases[number]
            fields: dict[str, Any] = {
                "input_norm": layer.input_norm.weight.data_ptr(),
                "bias": 0 if bias is None else bias.data_ptr(),
                "mlp_norm": layer.mlp_norm.weight.data_ptr(),
            }
            for name in ("qkv", "output", "gate_up", "down"):
                fields[name] = _linear(getattr(layer, name))
            fields |= {"prompt": self.cache.prompts.fields(number), "own": self.cache.own.fields(number)}
            records[number : number + 1] = record(LAYER, fields)
        return records


def _linear(linear: FusedLinear) -> dict[str, Any]:
    """The fields of a LINEAR record."""
    low, narrow, rounded = _low_blocks(linear), linear.narrow, linear.rounded()
    weight = linear.blocks if rounded is None else linear.up_blocks
    assert weight is not None, "the decoder was not packed for native code"
    return {
        "line": OUTPUTS * weight.element_size(),
        "weight": weight.data_ptr(),
        "rounded": 0 if rounded is None else rounded.blocks.data_ptr(),
        "blocks": weight.shape[0],
        "width": linear.in_features,
        "rank": linear.rank,
        "down": 0 if low is None else low.data_ptr(),
        "down_blocks": 0 if low is None else low.shape[0],
        "narrow": {} if narrow is None else narrow.fields(),
    }


def _low_blocks(linear: FusedLinear) -> Tensor | None:
    """[blocks, in, LANES]: every A."""
    return linear.path().down if linear.rank else None


def _chunks(slots: np.ndarray) -> np.ndarray:
    """[n, 3] slot, first place and rows of each chunk of rows whose slots, in order, are these.

    >>> _chunks(np.array([0, 0, 0, 0, 0, 2])).tolist()
    [[0, 0, 4], [0, 4, 1], [2, 5, 1]]
    """
    found: list[list[int]] = []
    for place, slot in enumerate(slots.tolist()):
        if found and found[-1][0] == slot and found[-1][2] < CHUNK:
            found[-1][2] += 1
        else:
            found.append([slot, place, 1])
    return np.array(found, dtype=np.int64)
