"""Updates: what is skipped, what is refused, what later passes compare with."""

import math
from pathlib import Path

import pytest
import torch

from conftest import tiny_llama, with_adapter
from greenloop.errors import TrainingError
from greenloop.learn import checkpoint
from greenloop.learn.checkpoint import Progress
from greenloop.learn.improve import Improver, TokenGroup
from greenloop.learn.optimise import make_optimizer, make_scheduler
from greenloop.learn.packing import pack
from greenloop.learn.policy import Policy
from greenloop.recipe import OptimizerSection, RlooSection

COMPLETIONS = ((5, 6, 7, 8), (9, 10), (11, 12, 13), (14,))


def group(first: int = 40, truncated: tuple[bool, ...] = (False,) * 4) -> TokenGroup:
    return TokenGroup(
        prompt=tuple(range(first, first + 9)),
        completions=COMPLETIONS,
        sampler_logprobs=tuple((-1.0,) * len(tokens) for tokens in COMPLETIONS),
        truncated=truncated,
    )


def improver(*, beta: float = 0.0, **rloo: object) -> Improver:
    policy = Policy(with_adapter(tiny_llama()), 0.9)
    section = OptimizerSection(learning_rate=1e-3, warmup_steps=0)
    optimizer = make_optimizer(policy.parameters, section)
    return Improver(
        policy,
        optimizer,
        make_scheduler(optimizer, section, 10),
        RlooSection(**rloo),
        beta=beta,
        max_grad_norm=1.0,
    )


def weights(one: Improver) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in one.policy.parameters])


def test_an_interpolated_policy_has_a_share_of_the_change_and_comes_back_bit_for_bit():
    one, half = improver(), improver()
    packs, before = [pack((40, 41, 42), COMPLETIONS, range(4))], weights(one)

    def logprobs(policy: Policy) -> torch.Tensor:
        return policy.logprobs(packs)[0].logprobs.detach()

    whole = logprobs(one.policy)
    with torch.no_grad():
        for name, parameter in half.policy.model.named_parameters():
            if "lora_B" in name:
                parameter *= 0.5
    half.policy.refresh()
    with one.policy.interpolated(0.5):
        assert torch.equal(logprobs(one.policy), logprobs(half.policy))
        assert not torch.allclose(logprobs(one.policy), whole)
    with one.policy.interpolated(0.0):
        torch.testing.assert_close(logprobs(one.policy), one.policy.reference_logprobs(packs)[0])
    with one.policy.interpolated(1.0):
        assert torch.equal(logprobs(one.policy), whole)
    assert torch.equal(weights(one), before)
    assert torch.equal(logprobs(one.policy), whole)


def test_a_batch_of_equal_rewards_takes_no_step_when_beta_is_0():
    one = improver()
    before = weights(one)
    update = one.improve([group(), group(80)], torch.tensor([[1.0] * 4, [0.0] * 4]))
    assert update.optimizer_steps == update.trained_tokens == 0
    assert torch.equal(weights(one), before)


def test_a_dead_group_adds_nothing_but_stays_in_the_denominator():
    rewards = torch.tensor([[1.0, 0, 0, 1]])
    alone, beside = improver(), improver()
    first = alone.improve([group()], rewards)
    second = beside.improve([group(), group(80)], torch.cat([rewards, torch.zeros(1, 4)]))
    assert second.grad_norm == pytest.approx(first.grad_norm / 2, rel=1e-5)
    assert second.trained_tokens == first.trained_tokens


def test_a_group_cut_into_packs_gives_the_same_update_with_kl():
    rewards = torch.tensor([[1.0, 0, 0.5, 0]])
    whole, cut = improver(beta=0.1), improver(beta=0.1, token_budget=16)
    expected, actual = whole.improve([group()], rewards), cut.improve([group()], rewards)
    torch.testing.assert_close(actual.advantages, expected.advantages, atol=1e-5, rtol=1e-5)
    assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    assert actual.kl_nats == pytest.approx(expected.kl_nats, rel=1e-4)
    assert expected.kl_nats != 0


def test_first_pass_is_plain_reinforce_and_later_passes_use_its_logprobs():
    rewards = torch.tensor([[1.0, 0, 0, 1]])
    once, thrice = improver(), improver(passes=3)
    assert once.improve([group()], rewards).clipped_fraction == 0
    update = thrice.improve([group()], rewards)
    assert update.optimizer_steps == 3
    assert update.loss == pytest.approx(0, abs=1e-6)
    # A huge first step moves the ratios far from 1: the later passes must see it.
    far = improver(passes=2)
    far.optimizer.param_groups[0]["lr"] = 0.5
    assert far.improve([group()], rewards).clipped_fraction > 0


def test_truncated_completions_are_masked_but_stay_in_the_baseline():
    rewards = torch.tensor([[1.0, 0, 0, 1]])
    masked = improver(mask_truncated=True)
    update = masked.improve([group(truncated=(True, False, False, True))], rewards)
    assert update.trained_tokens == len(COMPLETIONS[1]) + len(COMPLETIONS[2])
    assert update.advantages.tolist()[0] == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])


def test_gap_is_the_mean_distance_of_sampler_and_trainer():
    one = improver()
    update = one.improve([group()], torch.tensor([[1.0, 0, 0, 1]]))
    assert update.gap_nats > 0.1  # the sampler's log-probs were invented
    assert update.gap_nats_worst >= update.gap_nats


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_step(bad: float):
    one = improver()
    before = weights(one)
    with pytest.raises(TrainingError, match="the loss is"):
        one.improve([group()], torch.tensor([[1.0, 0, 0, bad]]))
    assert torch.equal(weights(one), before)


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    one = improver()
    one.policy.parameters[0].register_hook(lambda gradient: gradient * math.nan)
    before = weights(one)
    with pytest.raises(TrainingError, match="the gradient norm is nan"):
        one.improve([group()], torch.tensor([[1.0, 0, 0, 1]]))
    assert torch.equal(weights(one), before)


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("passes", [1, 2])
def test_an_update_in_parts_is_the_update_of_the_whole(beta: float, passes: int):
    groups = [group(), group(80), group(120), group(160), group(200)]
    nan = math.nan
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0], [1.0, 1, 1, 1], [1.0, nan, 0, 0], [nan, nan, nan, 1]])
    whole, apart = improver(beta=beta, passes=passes), improver(beta=beta, passes=passes)
    before = weights(apart)
    expected = whole.improve(groups, rewards)
    learning = apart.begin(rewards.numel())
    for start, end in [(0, 2), (2, 3), (3, 5)]:
        assert torch.equal(weights(apart), before)
        apart.add(learning, groups[start:end], rewards[start:end])
    actual = apart.finish(learning)
    torch.testing.assert_close(actual.advantages, expected.advantages)
    assert actual.kl_nats == pytest.approx(expected.kl_nats, rel=1e-5, nan_ok=True)
    assert actual.entropy_nats == pytest.approx(expected.entropy_nats, rel=1e-5)
    assert actual.clipped_fraction == expected.clipped_fraction
    assert actual.optimizer_steps == passes
    assert actual.trained_tokens == expected.trained_tokens
    assert actual.loss == pytest.approx(expected.loss, abs=1e-7)
    assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    assert (weights(apart) - weights(whole)).norm() < 1e-3 * (weights(whole) - before).norm()


def test_what_was_added_to_an_update_that_was_not_finished_is_dropped():
    rewards = torch.tensor([[1.0, 0, 0, 1]])
    fresh, again = improver(), improver()
    again.add(again.begin(4), [group(80)], rewards)
    first, second = fresh.improve([group()], rewards), again.improve([group()], rewards)
    assert (first.loss, first.grad_norm, first.trained_tokens) == (second.loss, second.grad_norm, second.trained_tokens)
    assert torch.equal(weights(fresh), weights(again))


def test_a_loaded_checkpoint_is_the_policy_that_was_saved(tmp_path: Path):
    one, other = improver(), improver()
    one.improve([group()], torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    checkpoint.save(tmp_path, one.policy, one.optimizer, one.scheduler, Progress(step=1, best_score=0.5))
    packed = pack(group().prompt, COMPLETIONS, range(4))
    saved, fresh = (p.logprobs([packed])[0].logprobs.detach() for p in (one.policy, other.policy))
    assert (saved - fresh).abs().max() > 1e-4
    progress = checkpoint.load(tmp_path, other.policy, other.optimizer, other.scheduler)
    assert progress == Progress(step=1, best_score=0.5)
    assert torch.equal(other.policy.logprobs([packed])[0].logprobs, saved)


def test_an_update_gives_up_the_laid_out_copy_of_the_weights():
    one = improver()
    decoder = one.policy.decoder
    decoder.pack(8)
    if decoder.layers[0].qkv._packed is None:
        pytest.skip("no float32 weight is laid out in this build; there is no copy")
    one.improve([group()], torch.tensor([[1.0, 0, 0.5, 0]]))
    assert all(fused._packed is None for layer in decoder.layers for fused in layer.linears)
    assert decoder.lm_head._packed is None
