"""Keys and values as a decode step reads them: keys in blocks of 16 tokens, values in blocks of 16 of their dimensions.

Where the decoder rounds its products they are 16-bit integers with a scale for each token of a head: half the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from greenloop.decoder.native.layout import LANES
from greenloop.decoder.native.records import KEEPING, place, record
from greenloop.decoder.native.team import compiled, run

if TYPE_CHECKING:
    from greenloop.decoder.stack import Decoder


@dataclass(frozen=True, slots=True)
class Targets:
    """Where tokens' keys and values belong, int64 [n] each."""

    sources: np.ndarray
    """Which of a forward's tokens it is."""
    strips: np.ndarray
    positions: np.ndarray
    """In the strip."""

    @classmethod
    def of(cls, places: Sequence[Sequence[int]], first: int) -> Targets:
        """Of sequences, whose tokens have these places in a forward, for the strips from `first` on."""
        lengths = [len(one) for one in places]
        return cls(
            np.array([place for one in places for place in one], dtype=np.int64),
            np.repeat(np.arange(first, first + len(places)), lengths),
            np.concatenate([np.arange(length) for length in lengths]),
        )


@dataclass(frozen=True, slots=True)
class Strips:
    """Of several sequences in all layers."""

    k: Tensor
    """[L, strips, Hkv, S / 16, D, 16] float32 or int16."""
    v: Tensor
    """[L, strips, Hkv, D / 16, S, 16]."""
    scales: Tensor | None
    """[2, L, strips, Hkv, S] of keys and of values; None where both are float32."""

    @classmethod
    def empty(cls, decoder: Decoder, count: int, tokens: int) -> Strips:
        """So many strips for as many tokens each.

        They are not filled with zeros: nothing is read that was not written, but for keys whose scores nobody reads.
        """
        shape, width, blocks = (len(decoder.layers), count, decoder.kv_heads), decoder.head_width, -(-tokens // LANES)
        dtype = torch.int16 if decoder.rounds else torch.float32
        return cls(
            torch.empty(*shape, blocks, width, LANES, dtype=dtype),
            torch.empty(*shape, width // LANES, blocks * LANES, LANES, dtype=dtype),
            torch.empty(2, *shape, blocks * LANES) if decoder.rounds else None,
        )

    @staticmethod
    def bytes_per_token(decoder: Decoder) -> int:
        """Of one token's keys and values in all layers."""
        one = decoder.head_width * 2 + 4 if decoder.rounds else decoder.head_width * 4
        return 2 * len(decoder.layers) * decoder.kv_heads * one

    @property
    def places(self) -> int:
        """For tokens, in a strip."""
        return self.v.shape[4]

    def fields(self, layer: int) -> dict[str, int]:
        """Of the layer's STRIPS record."""
        found = {"k": self.k[layer].data_ptr(), "v": self.v[layer].data_ptr(), "places": self.places}
        if self.scales is not None:
            found |= {"k_scales": self.scales[0, layer].data_ptr(), "v_scales": self.scales[1, layer].data_ptr()}
        return found

    def keep(self, layer: int, key: Tensor, value: Tensor, targets: Targets) -> None:
        """Put keys, at their positions, and values, [N, Hkv, D] both, where they belong."""
        taken, (_, heads, width) = np.zeros(1, dtype=np.int64), key.shape
        key, value = key.flatten(1).float(), value.flatten(1).float()
        fields = {
            "rows": len(targets.sources),
            "key": place(key),
            "value": place(value),
            "kv_heads": heads,
            "head_width": width,
            "sources": targets.sources.ctypes.data,
            "slots": targets.strips.ctypes.data,
            "positions": targets.positions.ctypes.data,
            "strips": self.fields(layer),
            "taken": taken.ctypes.data,
        }
        one = record(KEEPING, fields)
        run(compiled().keep.address, one.ctypes.data, torch.get_num_threads())

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Put the first tokens of a strip into another one."""
        blocks = -(-tokens // LANES)
        self.k[:, target, :, :blocks] = self.k[:, source, :, :blocks]
        self.v[:, target, :, :, :tokens] = self.v[:, source, :, :, :tokens]
        if self.scales is not None:
            self.scales[:, :, target, :, :tokens] = self.scales[:, :, source, :, :tokens]
