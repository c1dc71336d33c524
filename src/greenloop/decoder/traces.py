"""What the sampler has computed on its way, kept so that the trainer need not compute it again.

Between a rollout and its update the weights do not change, so the update's forward over the sampled tokens is the one
that the rollout has made. A token's values are found by the tokens that lead to it, from the prompt's first one on.
Memory is bounded: where it ends, whole groups are given up, since half a group is of no use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from greenloop.decoder.native.layout import GROUP, rounded_size
from greenloop.decoder.native.rounded import restored, rounded

if TYPE_CHECKING:
    from greenloop.decoder.stack import Decoder

PIECES = ("hidden", "low_qkv", "qkv", "attended", "low_output", "middle", "low_gate_up", "gate_up", "low_down")
"""Of a token in a layer, in their order: the residual stream before, x A^T of each linear layer, queries, keys and
values before they are turned, what attention made of them, the residual stream after it, gate and up."""


@dataclass(slots=True)
class _Group:
    """What is kept behind one prompt."""

    prompt: dict[tuple[int, ...], int] = field(default_factory=dict)
    completions: dict[tuple[int, ...], int] = field(default_factory=dict)


class Traces:
    """Values of tokens under the present weights, [capacity, L * layer size + d] float32."""

    def __init__(self, decoder: Decoder, memory: int) -> None:
        """Empty.

        Args:
            decoder: whose native code computes the tokens.
            memory: bytes at most.
        """
        layer = decoder.layers[0]
        widths = (
            layer.qkv.in_features,
            layer.qkv.rank,
            len(layer.qkv.weight),
            layer.output.in_features,
            layer.output.rank,
            layer.gate_up.in_features,
            layer.gate_up.rank,
            len(layer.gate_up.weight),
            layer.down.rank,
        )
        self.rounds = decoder.rounds
        """Whether whole groups are kept in 14 bits (`native.Rounded`), as products would round them."""
        self._widths = dict(zip(PIECES, widths, strict=True))
        sizes = {name: rounded_size(width) if self._is_rounded(name) else width for name, width in self._widths.items()}
        self._pieces, self._places = _side_by_side(self._widths), _side_by_side(sizes)
        self.layer_width: int = sum(widths)
        self.layer_size = sum(sizes.values())
        """Values that those of a layer take."""
        width = len(decoder.layers) * self.layer_size + widths[0]
        self.values = torch.empty(memory // (4 * width), width)
        """Pages that are not written take no memory."""
        self.recording = False
        self.clear()

    def clear(self) -> None:
        """The weights have changed, or what was kept has been used."""
        self._groups: dict[tuple[int, ...], _Group] = {}
        self._free: list[int] = []
        self._used = 0

    @contextmanager
    def record(self) -> Iterator[None]:
        """Keep what is sampled meanwhile, and nothing from before."""
        self.clear()
        self.recording = True
        try:
            yield
        finally:
            self.recording = False

    def keep(self, layer: int, name: str, first: int, piece: Tensor) -> None:
        """Keep one layer's [n, width] values of tokens whose places begin at `first`; see `PIECES`."""
        start, place = layer * self.layer_size, self._places[name]
        target = self.values[first : first + len(piece), start + place.start : start + place.stop]
        if self._is_rounded(name):
            rounded(piece, target)
        else:
            target.copy_(piece)

    def layer(self, layer: int, places: Tensor, space: Tensor) -> dict[str, Tensor]:
        """[n, width] of each piece of one layer, of the tokens at [n] places; views of `space` [n, layer width]."""
        start = layer * self.layer_size
        found = self.values[:, start : start + self.layer_size]
        if self.rounds:
            restored(found, places, [(width, self._is_rounded(name)) for name, width in self._widths.items()], space)
        else:
            torch.index_select(found, 0, places, out=space)
        return {name: space[:, piece] for name, piece in self._pieces.items()}

    def last(self) -> Tensor:
        """[capacity, d] of the residual stream after all layers, a view."""
        return self.values[:, -self._widths["hidden"] :]

    def _is_rounded(self, name: str) -> bool:
        return self.rounds and self._widths[name] % GROUP == 0

    def prompts(self, prompts: Sequence[tuple[int, ...]], places: Sequence[Sequence[int]], count: int) -> int | None:
        """The first of `count` places for the tokens of prompts; None if they do not fit.

        Args:
            prompts: to come.
            places: where each prompt's tokens stand among the `count`.
            count: tokens; those that several prompts begin with count once.
        """
        if self._used + count > len(self.values):
            return None
        first, self._used = self._used, self._used + count
        for prompt, mine in zip(prompts, places, strict=True):
            found = {prompt[: end + 1]: first + place for end, place in enumerate(mine)}
            self._groups[prompt] = _Group(prompt=found)
        return first

    def _place(self, prompt: tuple[int, ...], path: tuple[int, ...]) -> int | None:
        """A place for the token at the end of `path`, which goes on from its prompt; None if there is none."""
        if not self._free and self._used == len(self.values) and prompt in self._groups:
            # The last group that came gives its places to the others.
            _, given_up = self._groups.popitem()
            self._free.extend(given_up.completions.values())
        if prompt not in self._groups or not (self._free or self._used < len(self.values)):
            return None
        if self._free:
            place = self._free.pop()
        else:
            place, self._used = self._used, self._used + 1
        self._groups[prompt].completions[path] = place
        return place

    def addresses(self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Sequence[int]]) -> np.ndarray:
        """int64 [n] where native code may write the values of each completion's last token; 0 for nowhere."""
        pairs = zip(prompts, completions, strict=True)
        places = [self._place(prompt, (*prompt, *completion)) for prompt, completion in pairs]
        base, size = self.values.data_ptr(), self.values.stride(0) * self.values.element_size()
        # A later row may have taken the places of an earlier one's group.
        kept = [place is not None and prompt in self._groups for place, prompt in zip(places, prompts, strict=True)]
        found = [base + (place or 0) * size if keep else 0 for place, keep in zip(places, kept, strict=True)]
        return np.array(found, dtype=np.int64)

    def found(self, prompt: tuple[int, ...], paths: Sequence[tuple[int, ...]]) -> list[int] | None:
        """The places of all these tokens, the prompt's own among them; None if one is missing."""
        group = self._groups.get(prompt)
        if group is None:
            return None
        places = [group.prompt.get(path, group.completions.get(path)) for path in paths]
        return None if None in places else [place for place in places if place is not None]


def _side_by_side(sizes: Mapping[str, int]) -> dict[str, slice]:
    """Where things of these sizes stand.

    >>> _side_by_side({"one": 3, "two": 2})
    {'one': slice(0, 3, None), 'two': slice(3, 5, None)}
    """
    ends = accumulate(sizes.values())
    return {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}
