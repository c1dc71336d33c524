"""An update from what the sampler has kept is the update that computes it again."""

import pytest
import torch

from conftest import NO_NATIVE, ByteText, tiny_llama, tiny_qwen2, with_adapter
from greenloop.decoder.native import available
from greenloop.decoder.traces import Traces
from greenloop.engine.generate import Engine
from greenloop.engine.request import Request, Sampling
from greenloop.engine.stopping import Stopper
from greenloop.learn.packing import Pack, pack
from greenloop.learn.policy import Policy
from greenloop.native_trial import slopes

if not available():
    pytest.skip(NO_NATIVE, allow_module_level=True)

WARM = Sampling(temperature=0.8, top_k=3, max_new_tokens=20)
PROMPTS = [tuple(range(3, 36)), tuple(range(3, 20)), tuple(range(40, 47))]


def sampled(policy: Policy, prompts: list[tuple[int, ...]] = PROMPTS) -> list[Pack]:
    """The packs of a recorded rollout, five completions a prompt."""
    engine = Engine(policy.decoder, Stopper(ByteText(), frozenset(range(0, 300, 23))))
    wanted = [Request(token_ids=prompt, samples=5, seed=seed) for seed, prompt in enumerate(prompts)]
    with policy.recording():
        found = {(one.group, one.sample): one.token_ids for one in engine.generate(wanted, WARM)}
    return [pack(prompt, [found[group, k] for k in range(5)], range(5)) for group, prompt in enumerate(prompts)]


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
def test_log_probs_and_gradients_are_those_of_a_forward(make, monkeypatch):
    policy = Policy(with_adapter(make()), WARM.temperature)
    policy.remember(2**26)
    packs = sampled(policy)
    assert policy._traced(packs) is not None
    replayed = slopes(policy, packs)
    monkeypatch.setattr(policy, "_traced", lambda packs: None)
    computed = slopes(policy, packs)
    torch.testing.assert_close(replayed[0], computed[0], atol=1e-5, rtol=1e-5)
    for one, other in zip(replayed[1], computed[1], strict=True):
        assert other.norm() > 0
        assert (one - other).norm() / other.norm() < 1e-4


def test_each_recording_has_all_of_the_memory():
    policy = Policy(with_adapter(tiny_llama()), WARM.temperature)
    policy.remember(2**26)
    size = 4 * policy.decoder.traces.values.shape[1]
    first = sampled(policy, PROMPTS[:1])
    policy.remember(size * sum(len(one.token_ids) for one in first))
    first = sampled(policy, PROMPTS[:1])
    assert policy._traced(first) is not None
    second = sampled(policy, PROMPTS[1:2])
    assert policy._traced(second) is not None
    assert policy._traced(first) is None


def test_a_group_without_all_its_tokens_is_computed():
    policy = Policy(with_adapter(tiny_llama()), WARM.temperature)
    policy.remember(2**26)
    packs = sampled(policy)
    other = pack(PROMPTS[0], [(1, 2, 3), (299, 298, 297)], range(2))
    assert policy._traced([other]) is None
    assert policy._traced([packs[0], other]) is None
    assert len(policy.logprobs([packs[0], other])) == 2


def test_new_weights_forget_what_the_old_ones_computed():
    policy = Policy(with_adapter(tiny_llama()), WARM.temperature)
    policy.remember(2**26)
    packs = sampled(policy)
    policy.refresh()
    assert policy._traced(packs) is None


def test_nothing_is_kept_unless_a_rollout_is_recorded():
    policy = Policy(with_adapter(tiny_llama()), WARM.temperature)
    policy.remember(2**26)
    engine = Engine(policy.decoder, Stopper(ByteText(), frozenset()))
    (one,) = engine.generate([Request(token_ids=PROMPTS[0], samples=1, seed=0)], WARM)
    assert policy._traced([pack(PROMPTS[0], [one.token_ids], [0])]) is None


@pytest.mark.parametrize("groups", [0, 1, 2, 3])
@pytest.mark.parametrize("missing", [0, 1])
def test_where_memory_ends_whole_groups_are_given_up_and_the_others_are_right(groups: int, missing: int):
    policy = Policy(with_adapter(tiny_llama()), WARM.temperature)
    policy.remember(2**26)
    size = 4 * policy.decoder.traces.values.shape[1]
    everything = sampled(policy)
    complete = slopes(policy, everything)[0]
    # The prompts begin alike but for the third, so they need 33 + 7 places.
    tokens = 40 + sum(len(one.token_ids) - one.prompt_tokens for one in everything[:groups]) - missing
    policy.decoder.traces = Traces(policy.decoder, tokens * size)
    packs = sampled(policy)
    assert sum(policy._traced([one]) is not None for one in packs) == max(groups - missing, 0)
    scored = torch.cat([policy.logprobs([one])[0].logprobs.detach() for one in packs])
    torch.testing.assert_close(scored, complete, atol=1e-5, rtol=1e-5)


def test_without_memory_for_it_and_with_dropout_nothing_is_kept():
    policy = Policy(with_adapter(tiny_llama()), WARM.temperature)
    policy.remember(0)
    assert policy.decoder.traces is None
    with policy.recording():
        assert len(sampled(policy)) == 3
