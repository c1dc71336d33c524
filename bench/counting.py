"""What a stage has to compute and to read, counted from the sizes of the model: no measurement here."""

from __future__ import annotations

from dataclasses import dataclass

from greenloop.decoder import Decoder
from greenloop.decoder.native import Strips
from greenloop.decoder.native.layout import FEW


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one stage."""

    flops: float
    bytes: float

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The roofline: the longer of computing and reading (Williams, Waterman & Patterson 2009)."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


@dataclass(frozen=True, slots=True)
class Sizes:
    """A decoder's, with its adapter."""

    layer_weights: int
    """Of all layers together, adapter included."""
    adapter_weights: int
    head_weights: int
    attention_width: int
    """Query heads times head width, of all layers together."""
    kv_width: int
    """Keys and values of one token in all layers, elements."""
    element_bytes: int
    base_bytes: int
    """Of all layers' weights and the head without adapters, as products read them."""
    kept_bytes: float
    """Of an element of the keys and values that decode steps read."""
    spared_bytes: int
    """That few rows need not read, where native code reads weights in few bits."""

    @classmethod
    def of(cls, decoder: Decoder) -> Sizes:
        """Of this decoder."""
        linears = [fused for layer in decoder.layers for fused in layer.linears]
        adapter = sum(weight.numel() for fused in linears for weight in fused.adapter())
        base = sum(fused.base.numel() for fused in linears)
        every = (*linears, decoder.lm_head)
        rounded = [(fused.base, fused.rounded()) for fused in every]
        narrow = [(fused.base, fused.narrow) for fused in every if decoder.native]
        depth, width, element = len(decoder.layers), decoder.head_width, decoder.head.element_size()
        kept = 2 * depth * decoder.kv_heads * width
        return cls(
            layer_weights=base + adapter,
            adapter_weights=adapter,
            head_weights=decoder.head.numel(),
            attention_width=depth * decoder.heads * width,
            kv_width=kept,
            element_bytes=element,
            base_bytes=sum(whole.numel() * element if few is None else few.blocks.nbytes for whole, few in rounded),
            kept_bytes=Strips.bytes_per_token(decoder) / kept if decoder.native else element,
            spared_bytes=sum(whole.nbytes - few.nbytes for whole, few in narrow if few is not None),
        )

    def forward(self, tokens: int, scored: int, pairs: float, *, adapted: bool = True) -> Cost:
        """`tokens` through the layers, `scored` of them through the head, `pairs` of query and key attended."""
        weights = self.layer_weights if adapted else self.layer_weights - self.adapter_weights
        flops = 2 * tokens * weights + 2 * scored * self.head_weights + 4 * pairs * self.attention_width
        adapter_bytes = self.element_bytes * self.adapter_weights if adapted else 0
        return Cost(flops, self.base_bytes + adapter_bytes + self.element_bytes * tokens * self.kv_width)

    def decode_step(self, rows: int, groups: int, prompt: float, own: float) -> Cost:
        """One token for each row, with `own` tokens before it and a prompt that its group shares."""
        forward = self.forward(rows, rows, rows * (prompt + own))
        read_bytes = forward.bytes - (self.spared_bytes if rows <= FEW else 0)
        return Cost(forward.flops, read_bytes + self.kept_bytes * self.kv_width * (groups * prompt + rows * own))

    def update(self, tokens: int, scored: int, pairs: float) -> Cost:
        """Forward and backward with frozen base weights.

        Linear layers: the forward and the activations' gradient, and the adapter's own gradient. Head: the logits and
        the slope. Attention: two products forward, five backward (the scores once more, then the gradients of values,
        weights, queries and keys). The weights are read twice.
        """
        once = self.forward(tokens, scored, pairs)
        attention = 4 * pairs * self.attention_width
        flops = 2 * (once.flops - attention) + 3.5 * attention + 2 * tokens * self.adapter_weights
        return Cost(flops, 2 * once.bytes)


def group_pairs(prompt: int, samples: int, new_tokens: int) -> float:
    """Query-key pairs of one packed group: the prompt causally, each completion over the prompt and causally itself.

    The last token of a completion is only a label.
    """
    inputs = new_tokens - 1
    return prompt * (prompt + 1) / 2 + samples * inputs * (prompt + (inputs + 1) / 2)
