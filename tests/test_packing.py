"""Packs are the same computation as padded rows: log-probs and gradients."""

import pytest
import torch

from conftest import with_adapter
from greenloop.learn.logprob import score
from greenloop.learn.packing import Pack, pack, pack_group
from greenloop.learn.policy import Policy

PROMPT = tuple(range(40, 57))
COMPLETIONS = ((5, 6, 7, 8, 9), (11,), (12, 13), (5, 6, 20, 21, 22, 23, 24, 25))
TEMPERATURE = 0.8


def padded_logprobs(model: torch.nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """[T] from one whole row and whole logits: the slow independent version."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / TEMPERATURE
    return logits.log_softmax(dim=-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("token_budget", [10_000, 24])
def test_packed_logprobs_and_gradients_equal_the_padded_ones(tiny_model, token_budget: int):
    model = with_adapter(tiny_model)
    policy = Policy(model, TEMPERATURE)
    weights = torch.tensor([0.5, -1.0, 2.0, 0.3])
    expected = [padded_logprobs(model, PROMPT, completion) for completion in COMPLETIONS]
    expected_gradients = gradients(model, sum(w * e.sum() for w, e in zip(weights, expected, strict=True)))

    packs = pack_group(PROMPT, COMPLETIONS, range(4), token_budget)
    assert (len(packs) > 1) == (token_budget == 24)
    scored = [policy.logprobs(one).logprobs for one in packs]
    torch.testing.assert_close(torch.cat(scored), torch.cat(expected), atol=2e-5, rtol=1e-5)
    loss = sum(
        (weights[list(one.completions)][one.owner] * logprobs).sum()
        for one, logprobs in zip(packs, scored, strict=True)
    )
    for name, gradient in gradients(model, loss).items():
        error = (gradient - expected_gradients[name]).norm() / expected_gradients[name].norm()
        assert error < 1e-4, name


def test_siblings_do_not_see_each_other(tiny_model):
    policy = Policy(with_adapter(tiny_model), TEMPERATURE)

    def first(others: tuple[tuple[int, ...], ...]) -> torch.Tensor:
        (one,) = pack_group(PROMPT, (COMPLETIONS[0], *others), range(1 + len(others)), 10_000)
        return policy.logprobs(one).logprobs[one.owner == 0]

    torch.testing.assert_close(first(()), first(((99, 98, 97), (3,))), atol=1e-5, rtol=1e-5)


def test_reference_is_the_model_without_its_adapter(tiny_model):
    model = with_adapter(tiny_model)
    policy = Policy(model, TEMPERATURE)
    one = pack(PROMPT, COMPLETIONS, [0])
    with model.disable_adapter():
        expected = padded_logprobs(model, PROMPT, COMPLETIONS[0])
    torch.testing.assert_close(policy.reference_logprobs(one), expected.detach(), atol=2e-5, rtol=1e-5)
    assert (policy.logprobs(one).logprobs - expected).abs().max() > 0.01


def test_entropy_is_that_of_the_whole_vocabulary_at_the_temperature(tiny_model):
    model = with_adapter(tiny_model)
    policy = Policy(model, TEMPERATURE)
    ids = torch.tensor([PROMPT + COMPLETIONS[0]])
    logits = model(input_ids=ids).logits[0, len(PROMPT) - 1 : -1] / TEMPERATURE
    expected = torch.distributions.Categorical(logits=logits).entropy()
    actual = policy.logprobs(pack(PROMPT, COMPLETIONS, [0])).entropy
    torch.testing.assert_close(actual, expected.detach(), atol=2e-5, rtol=1e-5)


def test_a_pack_is_cut_between_completions_and_keeps_every_one():
    packs: list[Pack] = pack_group(PROMPT, COMPLETIONS, [3, 0, 2], 20)
    assert [one.completions for one in packs] == [(3,), (0,), (2,)]
    assert all(one.token_ids.shape == one.positions.shape for one in packs)


def test_a_pack_counts_no_input_for_a_last_token():
    one = pack(PROMPT, COMPLETIONS, [0, 1, 2, 3])
    assert len(one.token_ids) == len(PROMPT) + 4 + 0 + 1 + 7
    assert one.labels.tolist() == [token for completion in COMPLETIONS for token in completion]


def test_a_confident_tokens_slope_keeps_its_digits_in_bfloat16():
    """Where p is close to 1 the slope is a small difference; rounding p first would leave noise alone."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(50, 32, generator=generator)
    hidden = 0.45 * head[:4]
    labels = torch.arange(4)
    slopes = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = hidden.clone().to(dtype).requires_grad_()
        scored = score(leaf, head.to(dtype), labels, 1.0)
        assert scored.logprobs.exp().min() > 0.9
        scored.logprobs.sum().backward()
        slopes.append(leaf.grad.float())
    for exact, rounded in zip(*slopes, strict=True):
        assert (rounded - exact).norm() / exact.norm() < 0.1
