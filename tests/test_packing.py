"""Packs are the same computation as padded rows: log-probs and gradients."""

import pytest
import torch

from conftest import tiny_llama, with_adapter
from greenloop.decoder import FusedLinear
from greenloop.learn.logprob import score
from greenloop.learn.packing import Pack, pack, pack_group
from greenloop.learn.policy import Policy, adapt
from greenloop.recipe import LoraSection

pytestmark = pytest.mark.usefixtures("both_ways")

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
    scored = [policy.logprobs([one])[0].logprobs for one in packs]
    torch.testing.assert_close(torch.cat(scored), torch.cat(expected), atol=2e-5, rtol=1e-5)
    loss = sum(
        (weights[list(one.completions)][one.owner] * logprobs).sum()
        for one, logprobs in zip(packs, scored, strict=True)
    )
    for name, gradient in gradients(model, loss).items():
        error = (gradient - expected_gradients[name]).norm() / expected_gradients[name].norm()
        assert error < 1e-4, name


@pytest.mark.parametrize("together", [False, True], ids=["each by itself", "padded"])
def test_groups_in_one_forward_are_as_if_alone(tiny_model, together: bool):
    """Log-probs and gradients of two groups in one batch are the sums of those of each."""
    model = with_adapter(tiny_model)
    policy = Policy(model, TEMPERATURE, together=together)
    packs = [pack(PROMPT, COMPLETIONS, [0, 3]), pack(PROMPT[:5], COMPLETIONS, [1, 2])]
    alone = [policy.logprobs([one])[0].logprobs for one in packs]
    expected = gradients(model, alone[0].sum() - 2 * alone[1].sum())
    together = [scored.logprobs for scored in policy.logprobs(packs)]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients(model, together[0].sum() - 2 * together[1].sum()).items():
        assert (gradient - expected[name]).norm() / expected[name].norm() < 1e-4, name
    references = [policy.reference_logprobs([one])[0] for one in packs]
    for one, other in zip(policy.reference_logprobs(packs), references, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_siblings_do_not_see_each_other(tiny_model):
    policy = Policy(with_adapter(tiny_model), TEMPERATURE)

    def first(others: tuple[tuple[int, ...], ...]) -> torch.Tensor:
        (one,) = pack_group(PROMPT, (COMPLETIONS[0], *others), range(1 + len(others)), 10_000)
        return policy.logprobs([one])[0].logprobs[one.owner == 0]

    torch.testing.assert_close(first(()), first(((99, 98, 97), (3,))), atol=1e-5, rtol=1e-5)


def test_reference_is_the_model_without_its_adapter(tiny_model):
    model = with_adapter(tiny_model)
    policy = Policy(model, TEMPERATURE)
    one = pack(PROMPT, COMPLETIONS, [0])
    with model.disable_adapter():
        expected = padded_logprobs(model, PROMPT, COMPLETIONS[0])
    torch.testing.assert_close(policy.reference_logprobs([one])[0], expected.detach(), atol=2e-5, rtol=1e-5)
    assert (policy.logprobs([one])[0].logprobs - expected).abs().max() > 0.01


def test_entropy_is_that_of_the_whole_vocabulary_at_the_temperature(tiny_model):
    model = with_adapter(tiny_model)
    policy = Policy(model, TEMPERATURE)
    ids = torch.tensor([PROMPT + COMPLETIONS[0]])
    logits = model(input_ids=ids).logits[0, len(PROMPT) - 1 : -1] / TEMPERATURE
    expected = torch.distributions.Categorical(logits=logits).entropy()
    actual = policy.logprobs([pack(PROMPT, COMPLETIONS, [0])])[0].entropy
    torch.testing.assert_close(actual, expected.detach(), atol=2e-5, rtol=1e-5)


def test_a_pack_is_cut_between_completions_and_keeps_every_one():
    packs: list[Pack] = pack_group(PROMPT, COMPLETIONS, [3, 0, 2], 20)
    assert [one.completions for one in packs] == [(3,), (0,), (2,)]
    assert all(one.token_ids.shape == one.positions.shape for one in packs)


def test_what_completions_have_in_common_is_packed_once_and_no_last_token_at_all():
    one = pack(PROMPT, COMPLETIONS, [0, 1, 2, 3])
    # The fourth completion begins with the first two tokens of the first.
    assert len(one.token_ids) == len(PROMPT) + 4 + 0 + 1 + (7 - 2)
    assert [tuple(segment) for segment in one.segments] == [(17, 0), (2, 0), (1, 0), (2, 1), (5, 1)]
    assert one.labels[one.edges].tolist() == [token for completion in COMPLETIONS for token in completion]
    assert len(one.labels) == sum(map(len, COMPLETIONS)) - 2


@pytest.mark.parametrize(
    "completions",
    [
        ((5, 6, 7), (5, 6, 7), (5, 6, 7)),
        ((5, 6, 7, 8), (5,), (5, 6), (5, 6, 7, 9)),
        ((5, 6, 7, 8), (5, 6, 7, 9, 1), (5, 4, 7, 8), (5, 4, 3), (9, 6, 7, 8)),
        ((5,), (5,), (6,)),
    ],
    ids=["the same", "one in the other", "three levels", "no inputs"],
)
def test_a_tree_is_the_same_computation_as_its_padded_rows(tiny_model, completions: tuple[tuple[int, ...], ...]):
    model = with_adapter(tiny_model)
    policy = Policy(model, TEMPERATURE)
    weights = torch.linspace(-1, 2, len(completions))
    expected = [padded_logprobs(model, PROMPT, completion) for completion in completions]
    expected_gradients = gradients(model, sum(w * e.sum() for w, e in zip(weights, expected, strict=True)))
    one = pack(PROMPT, completions, range(len(completions)))
    scored = policy.logprobs([one])[0].logprobs
    torch.testing.assert_close(scored, torch.cat(expected), atol=2e-5, rtol=1e-5)
    for name, gradient in gradients(model, (weights[one.owner] * scored).sum()).items():
        error = (gradient - expected_gradients[name]).norm() / expected_gradients[name].norm()
        assert error < 1e-4, name


def test_a_confident_tokens_slope_keeps_its_digits_in_bfloat16():
    """Where p is close to 1 the slope is a small difference; rounding p first would leave noise alone."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(50, 32, generator=generator)
    hidden = 0.45 * head[:4]
    labels = torch.arange(4)
    slopes = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = hidden.clone().to(dtype).requires_grad_()
        linear = torch.nn.Linear(32, 50, bias=False).requires_grad_(False)
        linear.weight.data = head.to(dtype)
        scored = score(leaf, FusedLinear([linear]), labels, 1.0)
        assert scored.logprobs.exp().min() > 0.9
        scored.logprobs.sum().backward()
        slopes.append(leaf.grad.float())
    for exact, rounded in zip(*slopes, strict=True):
        assert (rounded - exact).norm() / exact.norm() < 0.1


def test_dropout_follows_its_seed_and_backward_its_masks():
    """Finite differences along the gradient, with the masks held by the seed."""
    model = adapt(tiny_llama(), LoraSection(rank=4, alpha=8, dropout=0.5), seed=0, base_name="tiny")
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    policy = Policy(model, TEMPERATURE)
    one = pack(PROMPT, COMPLETIONS, [0, 1, 2, 3])

    def total(seed: int = 5) -> torch.Tensor:
        policy.refresh()
        policy.seed_dropout(seed)
        return policy.logprobs([one])[0].logprobs.sum()

    assert total().item() == total().item()
    assert abs(total(6).item() - total().item()) > 0.01
    for kind in ("lora_A", "lora_B"):
        slopes = {name: slope for name, slope in gradients(model, total()).items() if kind in name}
        steepness = float(torch.stack([slope.square().sum() for slope in slopes.values()]).sum()) ** 0.5
        ends = []
        for step in (0.5e-3, -0.5e-3):
            for name, parameter in model.named_parameters():
                if name in slopes:
                    parameter.data += step / steepness * slopes[name]
            ends.append(total().item())
            for name, parameter in model.named_parameters():
                if name in slopes:
                    parameter.data -= step / steepness * slopes[name]
        assert (ends[0] - ends[1]) / 1e-3 == pytest.approx(steepness, rel=0.02)


def test_gradients_repeat_bit_for_bit():
    """What many completions share is the sum of what each says of it: always in the same order."""
    policy = Policy(with_adapter(tiny_llama()), TEMPERATURE)
    completions = [tuple((7 * sample + 3 * place) % 96 for place in range(24)) for sample in range(48)]
    (one,) = pack_group(PROMPT, completions, range(48), 10_000)
    weights = torch.linspace(-1.0, 1.0, len(one.owner))

    def once() -> list[torch.Tensor]:
        (scored,) = policy.logprobs([one])
        return list(gradients(policy.model, (weights * scored.logprobs).sum()).values())

    first = once()
    for _ in range(20):
        assert all(torch.equal(again, before) for again, before in zip(once(), first, strict=True))
