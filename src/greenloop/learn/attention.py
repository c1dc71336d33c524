"""The attention of a training forward, by PyTorch's operations or by native code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from greenloop.decoder import Decoder, DecoderLayer, rotate
from greenloop.decoder.native import LANES, attention, reads
from greenloop.learn import tree_attention
from greenloop.learn.operations import norm_gradient
from greenloop.learn.packing import Pack
from greenloop.learn.tree_attention import Layout, Part


class Attention(Protocol):
    """Of the packs of one forward, N tokens together."""

    def forward(self, layer: DecoderLayer, qkv: Tensor) -> tuple[Tensor, Any]:
        """[N, out] of the fused projection to the attended values [N, H * D], and what `backward` needs."""

    def backward(self, layer: DecoderLayer, kept: Any, gradient: Tensor) -> Tensor:
        """The gradient of the fused projection from that of the attended values."""


def attention_for(decoder: Decoder, packs: Sequence[Pack], cos: Tensor, sin: Tensor, *, together: bool) -> Attention:
    """Native code where it can be made and reads the heads.

    Args:
        decoder: of the layers.
        packs: that stand one after another.
        cos: [N, 1, D / 2] of the tokens' positions.
        sin: [N, 1, D / 2].
        together: attend to all packs in common products, padded, if PyTorch's operations do it.
    """
    if reads(decoder.head) and decoder.head_width % LANES == 0:
        segments = attention.Segments.of([pack.segments for pack in packs])
        heads = attention.Heads(decoder.heads, decoder.kv_heads, decoder.head_width, decoder.scale)
        return NativeAttention(decoder, heads, segments, cos, sin)
    layout_of = partial(Layout.of, queries=decoder.heads // decoder.kv_heads, like=decoder.head)
    starts = accumulate((len(pack.token_ids) for pack in packs), initial=0)
    layouts = (
        [layout_of(packs)]
        if together
        else [layout_of([pack], start) for pack, start in zip(packs, starts, strict=False)]
    )
    return TreeAttention(decoder, layouts, cos, sin)


@dataclass(frozen=True, slots=True)
class NativeAttention:
    """One call each way, straight from the projection."""

    decoder: Decoder
    heads: attention.Heads
    segments: attention.Segments
    cos: Tensor
    sin: Tensor

    def forward(self, layer: DecoderLayer, qkv: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
        """As `Attention` says."""
        projected = None
        if layer.query_norm is not None and layer.key_norm is not None:
            projected, value = _parted(self.decoder, qkv)
            query, key = projected.unflatten(-1, (-1, self.decoder.head_width)).split(
                [self.decoder.heads, self.decoder.kv_heads], dim=1
            )
            normed = [layer.query_norm(query.float()), layer.key_norm(key.float())]
            qkv = torch.cat([torch.cat(normed, dim=1).flatten(1), value], dim=1)
        attended = attention.attend(qkv, self.cos, self.sin, self.heads, self.segments)
        return attended, (qkv, projected)

    def backward(self, layer: DecoderLayer, kept: tuple[Tensor, Tensor | None], gradient: Tensor) -> Tensor:
        """As `Attention` says."""
        qkv, projected = kept
        found = attention.attend_back(qkv, self.cos, self.sin, self.heads, self.segments, gradient)
        if projected is None:
            return found
        turned, value = _parted(self.decoder, found)
        turned = turned.unflatten(-1, (-1, self.decoder.head_width))
        return torch.cat([_before_norms(self.decoder, layer, projected, turned).flatten(1), value], dim=1)


@dataclass(frozen=True, slots=True)
class TreeAttention:
    """`tree_attention`, on any device and in any dtype."""

    decoder: Decoder
    layouts: Sequence[Layout]
    """Which together hold each of the N tokens once."""
    cos: Tensor
    sin: Tensor

    def forward(self, layer: DecoderLayer, qkv: Tensor) -> tuple[Tensor, tuple[list[list[Part]], Tensor | None]]:
        """As `Attention` says."""
        decoder = self.decoder
        heads = decoder.heads_of(layer, qkv, self.cos, self.sin)
        trees = [tree_attention.plant(*heads, layout, decoder.scale) for layout in self.layouts]
        out = decoder.head.new_empty(len(self.cos), decoder.heads * decoder.head_width)
        for tree, layout in zip(trees, self.layouts, strict=True):
            tree_attention.mix(tree, layout, out)
        return out, (trees, _parted(decoder, qkv)[0] if layer.query_norm is not None else None)

    def backward(self, layer: DecoderLayer, kept: tuple[list[list[Part]], Tensor | None], gradient: Tensor) -> Tensor:
        """As `Attention` says."""
        decoder, (trees, projected) = self.decoder, kept
        query = gradient.new_empty(len(gradient), decoder.heads, decoder.head_width)
        # Sums over all that read a token: its shares must not round each other.
        key = torch.zeros(len(gradient), decoder.kv_heads, decoder.head_width, device=gradient.device)
        value = torch.zeros_like(key)
        for tree, layout in zip(trees, self.layouts, strict=True):
            tree_attention.gradients(tree, layout, gradient, decoder.scale, (query, key, value))
        turned = rotate(torch.cat([query, key.to(query.dtype)], dim=1), self.cos, -self.sin)
        if projected is not None:
            turned = _before_norms(decoder, layer, projected, turned).to(query.dtype)
        return torch.cat([turned, value.to(query.dtype)], dim=1).flatten(1)


def _parted(decoder: Decoder, qkv: Tensor) -> tuple[Tensor, Tensor]:
    """[N, (H + Hkv) * D] queries and keys, [N, Hkv * D] values."""
    values = decoder.kv_heads * decoder.head_width
    return qkv[:, :-values], qkv[:, -values:]


def _before_norms(decoder: Decoder, layer: DecoderLayer, projected: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of queries and keys before the norms of heads, [N, H + Hkv, D] float32, from that after them.

    Args:
        decoder: of the layer.
        layer: whose norms.
        projected: [N, (H + Hkv) * D] before the norms.
        gradient: [N, H + Hkv, D].
    """
    sizes = [decoder.heads, decoder.kv_heads]
    norms = [norm for norm in (layer.query_norm, layer.key_norm) if norm is not None]
    before = projected.unflatten(-1, (-1, decoder.head_width)).float().split(sizes, dim=1)
    pieces = [
        norm_gradient(norm, x, norm.inverse(x), out)
        for norm, x, out in zip(norms, before, gradient.split(sizes, dim=1), strict=True)
    ]
    return torch.cat(pieces, dim=1)
