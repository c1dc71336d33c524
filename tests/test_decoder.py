"""The decoder's kernels equal plain operations, and only what it computes is called supported."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from conftest import tiny_llama, tiny_qwen2, with_adapter
from greenloop.decoder import Decoder, supported
from greenloop.decoder.kernels import attend, attend_plainly, joined, packed
from greenloop.engine.build import make_engine
from greenloop.engine.fallback import TransformersEngine
from greenloop.learn.policy import Policy


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 16, generator=generator).to(dtype) for n in (4, 9, 9))
    mask = torch.zeros(2, 1, 1, 9, dtype=dtype)
    mask[1, ..., 6:] = float("-inf")
    return query, key, value, mask


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_both_attentions_and_the_join_of_two_halves_equal_one_softmax(dtype: torch.dtype, bound: float):
    query, key, value, mask = inputs(dtype)
    scores = (query.double() @ key.double().transpose(-1, -2)) * 0.25 + mask.double()
    expected = scores.softmax(dim=-1) @ value.double()
    for kernel in (attend, attend_plainly):
        whole = kernel(query, key, value, mask, 0.25)
        assert (whole.values.double() - expected).abs().max() < bound
        assert (whole.log_total.double() - scores.logsumexp(dim=-1)).abs().max() < bound
        parts = [kernel(query, key[:, :, s], value[:, :, s], mask[..., s], 0.25) for s in (slice(0, 4), slice(4, 9))]
        assert (joined(*parts).double() - expected).abs().max() < bound


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
def test_a_decoder_leaves_the_models_file(make, tmp_path):
    """So that the weights are in memory once: not as the file's pages beside the fused copy."""

    def mapped() -> bool:
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    make().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).requires_grad_(False)
    assert mapped()
    Decoder(model)
    assert not mapped()
    tokens = torch.arange(3, 12)[None]
    assert torch.equal(model(tokens).logits, make()(tokens).logits)


@pytest.mark.parametrize(("dtype", "relative", "absolute"), [(torch.bfloat16, 0.01, 0.05), (torch.float32, 1e-5, 1e-5)])
def test_a_packed_weight_gives_the_plain_product(dtype: torch.dtype, relative: float, absolute: float):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator).to(dtype)
    x = torch.randn(5, 32, generator=generator).to(dtype)
    laid_out = packed(weight, 8)
    if laid_out is None:
        pytest.skip(f"oneDNN lays no {dtype} weight out in this build or on this processor; plain products are used")
    exact = x.double() @ weight.double().T
    assert ((laid_out(x).double() - exact).abs() <= relative * exact.abs() + absolute).all()


def test_packed_and_plain_decoders_agree_in_bfloat16_before_and_after_a_refresh():
    model = with_adapter(tiny_llama().bfloat16())
    decoder = Decoder(model)
    decoder.reserve(300)
    tokens = torch.arange(7)

    def hidden() -> torch.Tensor:
        with torch.no_grad():
            return decoder.forward(tokens, tokens, lambda _, q, k, v: q.flatten(1)).float()

    before = hidden()
    decoder.pack(8)
    torch.testing.assert_close(hidden(), before, atol=0.05, rtol=0.05)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(-3)
    decoder.refresh()
    after = hidden()
    assert (after - before).abs().max() > 0.2
    decoder.pack(8)
    torch.testing.assert_close(hidden(), after, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"target_modules": ["lm_head"]}])
def test_an_adapter_that_is_not_plain_lora_goes_through_its_own_forward(options, byte_tokenizer):
    settings = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(tiny_qwen2(), LoraConfig(r=2, **settings))
    assert not supported(model)
    assert isinstance(make_engine(model, byte_tokenizer), TransformersEngine)


def test_the_trainer_and_the_engine_share_one_copy_of_the_weights(byte_tokenizer):
    policy = Policy(with_adapter(tiny_llama()), 1.0)
    engine = make_engine(policy.model, byte_tokenizer, decoder=policy.decoder)
    base = policy.model.get_base_model().model.layers[0].mlp.up_proj.get_base_layer().weight
    assert engine.decoder is policy.decoder
    assert base.untyped_storage().data_ptr() == policy.decoder.layers[0].gate_up.weight.untyped_storage().data_ptr()
