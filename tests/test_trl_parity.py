"""The same batch through TRL 1.16's RLOOTrainer and through ours: advantages, loss, every gradient, one optimiser step.

float32, dropout 0, non-zero B. The behaviour log-probs are TRL's own plus a shift that clips the ratio on both sides.
"""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from conftest import tiny_llama, tiny_qwen2, with_adapter
from greenloop.learn.improve import Improver, TokenGroup
from greenloop.learn.optimise import make_optimizer, make_scheduler
from greenloop.learn.packing import pack
from greenloop.learn.policy import Policy
from greenloop.recipe import OptimizerSection, RlooSection

pytestmark = pytest.mark.usefixtures("both_ways")

trl = pytest.importorskip("trl", reason="parity needs TRL (pip install greenloop[dev])")

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = ("one", "number")
COMPLETIONS = (
    ((65, 66, 67, 257), (68, 257), (69, 70, 71, 72, 73), (74, 75, 257)),
    ((80, 257), (81, 82, 83, 84, 257), (85, 86, 257), (87, 88, 89, 90)),
)
REWARDS = ((1.0, 0.0, 0.2, 1.0), (0.0, 0.1, 0.0, 1.0))
SHIFTS = (0.4, -0.4, 0.1, -0.5, 0.6, 0.05, -0.3, 0.0)
"""Added to the summed behaviour log-prob of each completion: ratios from exp(-0.6) to exp(0.5)."""
LEARNING_RATE = 1e-3


class ScriptedTrainer(trl.RLOOTrainer):
    """TRL's trainer with its rollouts, and the policy that made them, given."""

    def _generate(self, prompts):
        prompt_ids = [self.processing_class(prompt)["input_ids"] for prompt in prompts]
        completions = [list(tokens) for group in COMPLETIONS for tokens in group]
        return prompt_ids, completions, ["" for _ in completions]

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, *args, **kwargs):
        logps, *rest = super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **kwargs)
        if not torch.is_grad_enabled() and self.shift_next:
            self.shift_next = False
            logps = logps.clone()
            logps[:, 0] += torch.tensor(SHIFTS)
        return logps, *rest

    def batch(self):
        """TRL's own advantages and behaviour log-probs for the scripted rollouts."""
        self.shift_next = True
        return self._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS for _ in range(4)])


def trl_trainer(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, tmp_path, beta: float, rewards
) -> ScriptedTrainer:
    config = trl.RLOOConfig(
        output_dir=str(tmp_path),
        beta=beta,
        num_generations=4,
        per_device_train_batch_size=8,
        temperature=1.0,
        learning_rate=LEARNING_RATE,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
        report_to=[],
        use_cpu=True,
        max_completion_length=8,
    )
    flat = [reward for group in rewards for reward in group]
    return ScriptedTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [None if math.isnan(reward) else reward for reward in flat],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": list(PROMPTS)}),
        processing_class=tokenizer,
    )


def our_groups(tokenizer: PreTrainedTokenizerFast) -> list[TokenGroup]:
    return [
        TokenGroup(
            prompt=tuple(tokenizer(prompt)["input_ids"]),
            completions=completions,
            sampler_logprobs=tuple((0.0,) * len(tokens) for tokens in completions),
            truncated=(False,) * 4,
        )
        for prompt, completions in zip(PROMPTS, COMPLETIONS, strict=True)
    ]


def behaviour_of(policy: Policy, groups: list[TokenGroup]) -> torch.Tensor:
    """[P, K] summed log-probs with the shifts."""
    rows = []
    for group in groups:
        one = pack(group.prompt, group.completions, range(4))
        with torch.no_grad():
            logprobs = policy.logprobs([one])[0].logprobs
        rows.append(torch.zeros(4).index_add(0, one.owner, logprobs))
    return torch.stack(rows) + torch.tensor(SHIFTS).view(2, 4)


def trained(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("rewards", [REWARDS, ((1.0, math.nan, 0.2, 1.0), REWARDS[1])], ids=["judged", "unjudged"])
@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2], ids=["llama", "qwen2"])
def test_advantages_loss_gradients_and_step_equal_trls(make, beta, rewards, byte_tokenizer, tmp_path):
    ours = with_adapter(make())
    theirs = with_adapter(make())
    before = {name: p.detach().clone() for name, p in trained(ours).items()}

    trainer = trl_trainer(theirs, copy.deepcopy(byte_tokenizer), tmp_path, beta, rewards)
    if "ref" in theirs.peft_config:
        # For an adapter that it did not make, TRL takes a copy of it as reference; ours is the base, as for a new one.
        theirs.delete_adapter("ref")
    batch = trainer.batch()
    theirs.zero_grad()
    loss = trainer._compute_loss(theirs, batch)
    loss.backward()
    expected_gradients = {name: p.grad.clone() for name, p in trained(theirs).items()}
    torch.nn.utils.clip_grad_norm_(trained(theirs).values(), 1.0)
    torch.optim.AdamW(trained(theirs).values(), lr=LEARNING_RATE, weight_decay=0.0).step()

    policy = Policy(ours, 1.0)
    groups = our_groups(byte_tokenizer)
    section = OptimizerSection(learning_rate=LEARNING_RATE, warmup_steps=0)
    optimizer = make_optimizer(policy.parameters, section)
    improver = Improver(
        policy, optimizer, make_scheduler(optimizer, section, 1), RlooSection(), beta=beta, max_grad_norm=1.0
    )
    gradients: dict[str, torch.Tensor] = {}
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: p.grad.clone() for name, p in trained(ours).items()})
    )
    update = improver.improve(groups, torch.tensor(rewards), behaviour_of(policy, groups))

    torch.testing.assert_close(update.advantages.flatten(), batch["advantages"], atol=1e-5, rtol=1e-5)
    assert update.loss == pytest.approx(float(loss), abs=1e-5)
    ratios = torch.exp(-torch.tensor(SHIFTS))
    low = (ratios < 0.8) & (batch["advantages"] < 0)
    high = (ratios > 1.2) & (batch["advantages"] > 0)
    assert low.any()
    assert high.any()
    live = int((batch["advantages"] != 0).sum())
    assert update.clipped_fraction == pytest.approx(int((low | high).sum()) / live)
    # Ours are clipped to norm 1 by the time of the step; so are theirs after the call above.
    norm = torch.stack([g.norm() for g in expected_gradients.values()]).norm()
    assert update.grad_norm == pytest.approx(float(norm), rel=1e-4)
    for name, expected in expected_gradients.items():
        scaled = expected * min(1.0, 1.0 / float(norm + 1e-6))
        assert distance(gradients[name], scaled) < 1e-4, name
    # Adam's first step divides by |g|: where g is itself no more than rounding, its sign is, so those are left out.
    felt = {name: g.abs() > 1e-3 * g.abs().max() for name, g in expected_gradients.items()}
    assert sum(int(weights.sum()) for weights in felt.values()) > 0.9 * sum(
        weights.numel() for weights in felt.values()
    )
    update_of = [torch.cat([(p.detach() - before[n])[felt[n]] for n, p in trained(m).items()]) for m in (ours, theirs)]
    assert distance(*update_of) < 1e-4
