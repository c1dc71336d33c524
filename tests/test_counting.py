"""What bench/ counts, against torch's own count of the operations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.counting import Sizes, group_pairs
from conftest import NO_NATIVE, train_through_torch, with_adapter
from greenloop.decoder import Decoder
from greenloop.decoder.native import team
from greenloop.decoder.native.layout import FEW, GROUP, whole_blocks
from greenloop.learn.packing import pack
from greenloop.learn.policy import Policy
from greenloop.native_trial import matmul_precision, random_model

if team.available():
    from greenloop.decoder.native import rounded_tile

PROMPT, SAMPLES, NEW_TOKENS = 24, 3, 9


@pytest.mark.skipif(not team.available(), reason=NO_NATIVE)
def test_few_rows_read_less_where_native_code_does():
    decoder = Decoder(random_model())
    with team.without_native_code():
        plainly = Sizes.of(Decoder(random_model()))
    found = Sizes.of(decoder)
    narrow = [fused.narrow for fused in (*decoder.layers[0].linears, decoder.lm_head)]
    whole = [fused.base for fused in (*decoder.layers[0].linears, decoder.lm_head)]
    spared = sum(one.nbytes for one in whole) - sum(one.nbytes for one in narrow if one is not None)
    assert 0 < found.spared_bytes == spared
    assert plainly.spared_bytes == 0
    few, more = (sizes.decode_step(FEW, 1, 10, 5).bytes for sizes in (found, plainly))
    assert more - few == spared
    assert found.decode_step(FEW + 1, 1, 10, 5) == plainly.decode_step(FEW + 1, 1, 10, 5)


@pytest.mark.skipif(not team.available(), reason=NO_NATIVE)
def test_rounded_weights_and_what_is_kept_of_them_count_with_their_scales(monkeypatch):
    monkeypatch.setattr(rounded_tile, "multiplies_pairs", lambda: True)
    whole = Sizes.of(Decoder(random_model()))
    with matmul_precision("high"):
        decoder = Decoder(random_model())
    sizes, outputs = Sizes.of(decoder), 0
    for fused in (*(fused for layer in decoder.layers for fused in layer.linears), decoder.lm_head):
        outputs += whole_blocks(len(fused.base)) * fused.in_features
    # 16 bits and a scale of 32 for a group; keys and values have one for the 64 of a head.
    assert sizes.base_bytes == outputs * (2 + 4 / GROUP)
    assert whole.base_bytes == 4 * (whole.layer_weights - whole.adapter_weights + whole.head_weights)
    read = sizes.decode_step(FEW + 1, 1, 10, 5).bytes - sizes.forward(FEW + 1, FEW + 1, 1).bytes
    assert read == (2 + 4 / 64) * sizes.kv_width * (10 + 5 * (FEW + 1))
    assert sizes.spared_bytes == 0
    assert sizes.forward(9, 9, 50).flops == whole.forward(9, 9, 50).flops


def test_a_groups_pairs_are_those_of_the_tree_mask():
    seen = sum(range(1, PROMPT + 1)) + SAMPLES * sum(PROMPT + t for t in range(1, NEW_TOKENS))
    assert group_pairs(PROMPT, SAMPLES, NEW_TOKENS) == seen


@pytest.mark.parametrize("update", [False, True])
def test_flops_are_those_that_torch_counts(tiny_model, monkeypatch, update: bool):
    # Torch cannot count what native code does.
    train_through_torch(monkeypatch)
    policy = Policy(with_adapter(tiny_model), 1.0)
    # They have no beginning in common.
    completions = [tuple(range(k, k + NEW_TOKENS)) for k in range(SAMPLES)]
    packs = [pack(tuple(range(PROMPT)), completions, range(SAMPLES))]
    inputs, scored = PROMPT + SAMPLES * (NEW_TOKENS - 1), SAMPLES * NEW_TOKENS
    # Torch counts dense products: every query sees every key of its part.
    dense = PROMPT * PROMPT + SAMPLES * (NEW_TOKENS - 1) * (PROMPT + NEW_TOKENS - 1)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(update):
        logprobs = policy.logprobs(packs)[0].logprobs
        if update:
            logprobs.sum().backward()
    sizes = Sizes.of(policy.decoder)
    counted = (sizes.update if update else sizes.forward)(inputs, scored, dense).flops
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.12)
