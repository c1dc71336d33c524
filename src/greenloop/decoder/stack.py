"""A Llama or Qwen decoder as plain functions over fused weights.

In: a transformers causal LM, with or without PEFT's LoRA layers. Out: hidden states. The attention itself is the
caller's: prefill, decode and training read different keys. Sampler and trainer run this one stack, so they differ in
the rounding of their matrix shapes alone; the residual stream is float32 for the same reason (in bfloat16 each layer
would round it anew).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenloop.decoder.kernels import packs
from greenloop.decoder.linear import FusedLinear, base_of, is_plain
from greenloop.decoder.native import Product, fits, reads, rounds, rows
from greenloop.decoder.native.attention import Heads, Segments, attend
from greenloop.decoder.traces import Traces

_FEW_ROWS = 24

SUPPORTED = frozenset({"llama", "qwen2", "qwen3", "mistral"})

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [N, H, D], k [N, Hkv, D], v [N, Hkv, D]) -> [N, H * D]."""
Keep = Callable[[int, Tensor, Tensor], None]
"""(layer, k [N, Hkv, D], v [N, Hkv, D])."""


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS normalisation of float32 values."""

    weight: Tensor
    """[d] float32."""
    eps: float
    dtype: torch.dtype
    """Of the result."""

    def inverse(self, x: Tensor) -> Tensor:
        """[..., d] to [..., 1]: 1 / root mean square."""
        squares: Tensor = torch.linalg.vecdot(x, x)
        return squares.div_(x.shape[-1]).add_(self.eps).rsqrt_()[..., None]

    def __call__(self, x: Tensor) -> Tensor:
        """[..., d] to the same shape in the weights' dtype."""
        if x.is_cuda:
            # One kernel there; a processor takes longer with it for many rows.
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps).to(self.dtype)
        return self.scaled(x, self.inverse(x))

    def scaled(self, x: Tensor, inverse: Tensor) -> Tensor:
        """The same with `inverse(x)` at hand."""
        return (x * inverse).mul_(self.weight).to(self.dtype)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The weights of one layer."""

    input_norm: Norm
    qkv: FusedLinear
    query_norm: Norm | None
    key_norm: Norm | None
    output: FusedLinear
    mlp_norm: Norm
    gate_up: FusedLinear
    down: FusedLinear

    @property
    def linears(self) -> tuple[FusedLinear, ...]:
        """In the order of the computation."""
        return (self.qkv, self.output, self.gate_up, self.down)


class Decoder:
    """Weights of a supported causal LM, fused."""

    def __init__(self, model: nn.Module) -> None:
        causal = unwrapped(model)
        _leave_file(causal)
        config = causal.config
        self.inner: Any = causal.model
        self.head: Tensor = causal.lm_head.weight
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.inner_width: int = config.intermediate_size
        self.scale = self.head_width**-0.5
        self.layers = [_layer(layer, self.head.dtype) for layer in self.inner.layers]
        self.norm = _norm(self.inner.norm, self.head.dtype)
        self._cos = self._sin = torch.empty(0)
        self.lm_head = FusedLinear([causal.lm_head])
        self.native = fits(self)
        """Whether a decode step may run as native code (`native.Step`)."""
        self.rounds = reads(self.head) and rounds()
        """Whether native code multiplies with rounded weights (`native.rounds` when this was made)."""
        for fused in self._fused():
            fused.rounds = self.rounds
        self._packed: tuple[bool, int] | None = None
        self.traces: Traces | None = None
        """What rollouts leave for updates, if somebody wants it."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and the caches."""
        return self.head.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.device

    def native_for(self, rows: int) -> bool:
        """Whether decode steps of so many rows are best run as native code.

        A processor that multiplies in bfloat16 computes many rows faster so: with two cores and AMX 8, 16, 32 and 64
        rows took 17, 29, 52 and 109 ms in native code against 35, 40, 48 and 68 (LOG.md).
        """
        return self.native and (rows <= _FEW_ROWS or self.dtype == torch.float32 or not packs(self.dtype))

    def refresh(self) -> None:
        """Take the adapter's present values."""
        self._packed = None
        if self.traces is not None:
            self.traces.clear()
        for fused in self._fused():
            fused.refresh()

    def pack(self, rows: int) -> None:
        """Lay the present weights out for decode steps of about `rows` rows, until the next `refresh` or `unpack`."""
        native = self.native_for(rows)
        # Native code has one layout, oneDNN one for each number of rows.
        packed = (native, 0 if native else rows)
        if self._packed == packed:
            return
        self._packed = None
        for fused in self._fused():
            fused.pack(rows, native=native)
        self._packed = packed

    def unpack(self) -> None:
        """Give up what `pack` made: a second copy of all weights."""
        self._packed = None
        for fused in self._fused():
            fused.unpack()

    def _fused(self) -> Iterator[FusedLinear]:
        for layer in self.layers:
            yield from layer.linears
        yield self.lm_head

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """[N] tokens at [N] reserved positions to [N, d] hidden states after the final norm. Keeps no graph."""
        return self.forward_at(token_ids, *self.rotary(positions), attend)

    def forward_at(self, token_ids: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """The same at the angles that `rotary` gives for the positions."""
        hidden = self.embed(token_ids)
        for index, layer in enumerate(self.layers):
            q, k, v = self.heads_of(layer, layer.qkv(layer.input_norm(hidden)), cos, sin)
            hidden += layer.output(attend(index, q, k, v))
            hidden += layer.down(gated(layer.gate_up(layer.mlp_norm(hidden))))
        return self.norm(hidden)

    def forward_tree(
        self, token_ids: Tensor, positions: Tensor, segments: Segments, keep: Keep, first: int | None = None
    ) -> Tensor:
        """`forward` of trees by native code that reads float32 weights as they stand, before the final norm.

        Args:
            token_ids: [N].
            positions: [N], reserved.
            segments: which token sees which.
            keep: gets each layer's keys and values.
            first: the tokens' first place in `traces`; None if they are not kept.
        """
        traces = None if first is None else self.traces

        def trace(index: int, **pieces: Tensor | None) -> None:
            for name, piece in pieces.items():
                if traces is not None and first is not None and piece is not None:
                    traces.keep(index, name, first, piece)

        cos, sin = self.rotary(positions)
        heads = Heads(self.heads, self.kv_heads, self.head_width, self.scale)
        hidden = self.embed(token_ids)
        for index, layer in enumerate(self.layers):
            trace(index, hidden=hidden)
            qkv, low_qkv = layer.qkv.summed(rows.normed(hidden, layer.input_norm.weight, layer.input_norm.eps))
            _, key, value = qkv.unflatten(-1, (-1, self.head_width)).split(
                [self.heads, self.kv_heads, self.kv_heads], dim=1
            )
            keep(index, rotate(key, cos, sin), value)
            attended = attend(qkv, cos, sin, heads, segments)
            middle, low_output = layer.output.summed(attended, hidden)
            gate_up, low_gate_up = layer.gate_up.summed(rows.normed(middle, layer.mlp_norm.weight, layer.mlp_norm.eps))
            hidden, low_down = layer.down.summed(rows.gated(gate_up), middle)
            trace(index, low_qkv=low_qkv, qkv=qkv, attended=attended, low_output=low_output)
            trace(index, middle=middle, low_gate_up=low_gate_up, gate_up=gate_up, low_down=low_down)
        if traces is not None and first is not None:
            traces.last()[first : first + len(hidden)] = hidden
        return hidden

    def embed(self, token_ids: Tensor) -> Tensor:
        """[N] to the residual stream [N, d], float32."""
        embedded: Tensor = self.inner.embed_tokens(token_ids)
        return embedded.float()

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, d] to [N, V], in float32 where native code can read the head."""
        blocks = self.lm_head.blocks
        return self.lm_head(hidden) if blocks is None else Product(self.lm_head.weight, blocks)(hidden)

    def heads_of(self, layer: DecoderLayer, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, out] of the fused projection to q [N, H, D], k and v [N, Hkv, D], q and k at their positions."""
        heads = qkv.unflatten(-1, (-1, self.head_width))
        q_and_k, v = heads[:, : self.heads + self.kv_heads], heads[:, self.heads + self.kv_heads :]
        if layer.query_norm is not None and layer.key_norm is not None:
            q, k = q_and_k[:, : self.heads], q_and_k[:, self.heads :]
            q_and_k = torch.cat([layer.query_norm(q.float()), layer.key_norm(k.float())], dim=1)
        turned = rotate(q_and_k, cos, sin)
        return turned[:, : self.heads], turned[:, self.heads :], v

    def reserve(self, positions: int) -> None:
        """Let `rotary` know the positions below `positions`. It cannot find out: asking a GPU would wait for it."""
        if positions <= self._cos.shape[0]:
            return
        table = torch.arange(max(positions, 1024), device=self.device)[None]
        cos, sin = self.inner.rotary_emb(torch.empty(1, dtype=self.dtype, device=self.device), table)
        # Both halves of a head turn by the same angles.
        half = self.head_width // 2
        self._cos, self._sin = cos[0, :, None, :half].contiguous(), sin[0, :, None, :half].contiguous()

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 1, D / 2] cosines and sines of reserved positions."""
        return self._cos[positions], self._sin[positions]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[N, heads, D] with each pair (i, i + D / 2) turned by its angle; `-sin` turns back."""
    half = x.shape[-1] // 2
    left, right = x[..., :half], x[..., half:]
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(left, cos, out=turned[..., :half]).addcmul_(right, sin, value=-1)
    torch.mul(right, cos, out=turned[..., half:]).addcmul_(left, sin)
    return turned


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [N, 2m] to [N, m]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def supported(model: nn.Module) -> bool:
    """Whether `Decoder` computes this model: a Llama or Qwen stack with full attention, fixed angles, plain LoRA."""
    causal = unwrapped(model)
    config: Any = causal.config
    if config.model_type not in SUPPORTED or getattr(config, "hidden_act", "silu") != "silu":
        return False
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if rope not in {"default", "linear", "llama3", "yarn"} or windowed:
        return False
    ends_plain = isinstance(causal.lm_head, nn.Linear) and isinstance(causal.model.embed_tokens, nn.Embedding)
    return ends_plain and all(is_plain(linear) for layer in causal.model.layers for linear in _linears(layer))


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    peft: Any = model
    return peft.get_base_model() if hasattr(model, "get_base_model") else model


def _leave_file(causal: Any) -> None:
    """Copy the weights that no `FusedLinear` copies: a mapped file stays in memory as long as one of them is in it."""
    linears = [causal.lm_head, *(linear for layer in causal.model.layers for linear in _linears(layer))]
    fused = {id(base_of(linear).weight) for linear in linears}
    for parameter in causal.parameters():
        # On a GPU nothing is mapped, and captured graphs know where it lies.
        if id(parameter) not in fused and not parameter.requires_grad and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _linears(layer: Any) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    ]


def _layer(layer: Any, dtype: torch.dtype) -> DecoderLayer:
    q, k, v, o, gate, up, down = _linears(layer)
    query_norm, key_norm = (getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm"))
    return DecoderLayer(
        input_norm=_norm(layer.input_layernorm, dtype),
        qkv=FusedLinear([q, k, v]),
        query_norm=None if query_norm is None else _norm(query_norm, dtype),
        key_norm=None if key_norm is None else _norm(key_norm, dtype),
        output=FusedLinear([o]),
        mlp_norm=_norm(layer.post_attention_layernorm, dtype),
        gate_up=FusedLinear([gate, up]),
        down=FusedLinear([down]),
    )


def _norm(module: Any, dtype: torch.dtype) -> Norm:
    return Norm(module.weight.detach().float(), module.variance_epsilon, dtype)
