"""Attention for packed groups, registered with transformers as `greenloop_tree`.

The prompt attends causally to itself; each completion attends to the whole prompt and causally to itself; siblings do
not see each other. Computed as two dense products (prompt; completions as a padded batch), so nothing is spent on
sibling pairs. Works for every transformers model that goes through its attention interface.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from greenloop.learn.packing import Pack

NAME = "greenloop_tree"


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pack: Pack,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Mix values along the pack's tree.

    Args:
        module: the attention layer (unused).
        query: [1, H, N, D].
        key: [1, Hkv, N, D].
        value: [1, Hkv, N, D].
        attention_mask: unused; the pack says who attends to whom.
        pack: the group's layout.
        scaling: of the scores.
        dropout: must be 0.

    Returns:
        [1, N, H, D] and no weights.
    """
    assert dropout == 0, "attention dropout would make the policy differ from the sampler"
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    end = pack.prompt_tokens
    prompt = F.scaled_dot_product_attention(
        query[:, :, :end], key[:, :, :end], value[:, :, :end], is_causal=True, scale=scaling
    )
    if pack.grid.shape[1] == 0:
        return prompt.transpose(1, 2), None
    branches = _branches(query[0], key[0], value[0], pack, scaling)
    return torch.cat([prompt[0].transpose(0, 1), branches])[None], None


def _branches(query: Tensor, key: Tensor, value: Tensor, pack: Pack, scaling: float | None) -> Tensor:
    """[H, N, D] to the mixed values of all completion inputs, [N - prompt, H, D]."""
    rows, longest = pack.grid.shape
    end = pack.prompt_tokens

    def padded(x: Tensor) -> Tensor:
        batched: Tensor = x[:, pack.grid.flatten()].unflatten(1, (rows, longest))
        return batched.transpose(0, 1)

    def with_prompt(x: Tensor) -> Tensor:
        return torch.cat([x[None, :, :end].expand(rows, -1, -1, -1), padded(x)], dim=2)

    own = torch.ones(longest, longest, dtype=torch.bool, device=query.device).tril()
    visible = torch.cat([own.new_ones(longest, end), own], dim=1)
    mixed = F.scaled_dot_product_attention(
        padded(query), with_prompt(key), with_prompt(value), attn_mask=visible, scale=scaling
    )
    return mixed.transpose(1, 2)[pack.inside]


AttentionInterface.register(NAME, tree_attention)
