"""Two CPU kernels that PyTorch has but does not name in public, with plain operations where they are missing.

`packed` lays a weight out once for oneDNN: at 64 rows a bfloat16 product with a plain weight spends half its time
laying it out anew, a float32 one a fifth. `attend` is the flash kernel that also returns the log of the softmax's
denominator, so that two attentions over different keys can be joined exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def packed(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor] | None:
    """The product with the [out, in] weight laid out by oneDNN for about `rows` rows: [N, in] to [N, out].

    None where laying it out gains nothing. Later changes of the weight are not seen.
    """
    if weight.device.type != "cpu" or not packs(weight.dtype):
        return None
    return partial(_packed_linear, weight=torch.ops.mkldnn._reorder_linear_weight(weight, rows))


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN lays weights of this dtype out here; bfloat16 only where the processor multiplies in it."""
    if not _has("mkldnn", "_reorder_linear_weight"):
        return False
    if dtype == torch.bfloat16:
        return _has("mkldnn", "_is_mkldnn_bf16_supported") and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _packed_linear(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


@dataclass(frozen=True, slots=True)
class Mixed:
    """Attention over some of the keys."""

    values: Tensor
    """[B, H, Q, D] weighted by the softmax over these keys alone."""
    log_total: Tensor
    """[B, H, Q] float32: log of the sum of exp(score) over these keys."""


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Mixed:
    """Attention and its denominator.

    Args:
        query: [B, H, Q, D].
        key: [B, H, S, D].
        value: [B, H, S, D].
        mask: [B, 1, 1, S] in the query's dtype, 0 or -inf; each row sees at least one key.
        scale: of the scores.
    """
    if query.device.type == "cpu" and _has("aten", "_scaled_dot_product_flash_attention_for_cpu"):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        values, log_total = flash(query, key, value, attn_mask=mask, scale=scale)
        return Mixed(values, log_total)
    return attend_plainly(query, key, value, mask, scale)


def attend_plainly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Mixed:
    """`attend` in single operations, for any device."""
    scores = (query @ key.transpose(-1, -2)).float().mul_(scale).add_(mask)
    weights = F.softmax(scores, dim=-1).to(query.dtype)
    return Mixed(weights @ value, scores.logsumexp(dim=-1))


def joined(first: Mixed, second: Mixed) -> Tensor:
    """[B, H, Q, D]: attention over both sets of keys, in the values' dtype."""
    share = torch.sigmoid(first.log_total - second.log_total)[..., None]
    return torch.lerp(second.values.float(), first.values.float(), share).to(first.values.dtype)


def _has(namespace: str, name: str) -> bool:
    return hasattr(getattr(torch.ops, namespace), name)
