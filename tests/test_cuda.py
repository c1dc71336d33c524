"""A CUDA device against the CPU: the same tokens, the same log-probs, the same update."""

from dataclasses import replace

import pytest
import torch

from conftest import ByteText, tiny_llama, with_adapter
from greenloop.decoder import Decoder
from greenloop.engine.generate import Engine
from greenloop.engine.request import Request, Sampling
from greenloop.engine.stopping import Stopper
from greenloop.learn.improve import Improver, TokenGroup, Update
from greenloop.learn.optimise import make_optimizer, make_scheduler
from greenloop.learn.policy import Policy
from greenloop.recipe import OptimizerSection, RlooSection

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

ENDS = frozenset(range(0, 300, 23))
WARM = Sampling(temperature=1.0, max_new_tokens=40)
REQUESTS = [
    Request(
        token_ids=tuple(torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist()),
        samples=5,
        seed=n,
    )
    for n in (5, 17, 9, 30)
]


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def completions(engine: Engine, sampling: Sampling = WARM) -> dict:
    return {(c.group, c.sample): c for c in engine.generate(REQUESTS, sampling)}


def adapted(device: str):
    return with_adapter(tiny_llama()).to(device)


@pytest.mark.parametrize("fixed", [True, False], ids=["graphs", "free shapes"])
@pytest.mark.parametrize("rows", [3, 64])
@pytest.mark.parametrize(
    "sampling",
    [WARM, replace(WARM, temperature=0.0), replace(WARM, top_k=20, top_p=0.9)],
    ids=["sampled", "greedy", "truncated"],
)
def test_tokens_equal_the_processors(fixed: bool, rows: int, sampling: Sampling):
    stopper = Stopper(ByteText(), ENDS)
    expected = completions(Engine(Decoder(adapted("cpu")), stopper), sampling)
    engine = Engine(Decoder(adapted("cuda")), stopper, rows=rows, fixed=fixed)
    for _ in range(2):
        found = completions(engine, sampling)
        assert {key: one.token_ids for key, one in found.items()} == {
            key: one.token_ids for key, one in expected.items()
        }
        for key, one in expected.items():
            assert found[key].logprobs == pytest.approx(one.logprobs, abs=1e-4)


def test_graphs_read_the_adapters_new_values():
    model = adapted("cuda")
    engine = Engine(Decoder(model), Stopper(ByteText(), ENDS))
    before = completions(engine)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-3)
    engine.refresh()
    after = completions(engine)
    fresh = completions(Engine(Decoder(model), Stopper(ByteText(), ENDS), fixed=False))
    assert {key: one.token_ids for key, one in after.items()} == {key: one.token_ids for key, one in fresh.items()}
    assert any(after[key].token_ids != one.token_ids for key, one in before.items())


def updated(device: str, beta: float) -> tuple[Update, list[torch.Tensor]]:
    policy = Policy(adapted(device), temperature=1.0)
    engine = Engine(policy.decoder, Stopper(ByteText(), ENDS))
    section = OptimizerSection(warmup_steps=0)
    optimizer = make_optimizer(policy.parameters, section)
    scheduler = make_scheduler(optimizer, section, 10)
    improver = Improver(policy, optimizer, scheduler, RlooSection(), beta=beta, max_grad_norm=1.0)
    found = completions(engine)
    groups = [
        TokenGroup.of(request.token_ids, [found[index, k] for k in range(5)]) for index, request in enumerate(REQUESTS)
    ]
    update = improver.improve(groups, torch.arange(20.0).view(4, 5) % 3)
    return update, [parameter.grad.cpu() for parameter in policy.parameters]


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_an_update_equals_the_processors(beta: float):
    (ours, gradients), (expected, expected_gradients) = updated("cuda", beta), updated("cpu", beta)
    torch.testing.assert_close(ours.advantages, expected.advantages, atol=1e-4, rtol=1e-4)
    assert ours.loss == pytest.approx(expected.loss, abs=1e-4)
    assert ours.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
    assert ours.gap_nats_worst < 1e-3
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4 * float(wanted.abs().max()) + 1e-7, rtol=1e-3)
