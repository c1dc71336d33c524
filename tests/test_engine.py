"""The engine against transformers, against itself at other batch shapes, and against the trainer."""

from dataclasses import replace

import pytest
import torch

from conftest import ByteText, with_adapter
from greenloop.decoder import Decoder
from greenloop.engine.build import make_engine
from greenloop.engine.cache import KVCache
from greenloop.engine.fallback import TransformersEngine
from greenloop.engine.generate import CACHE_BYTES, MOST_ROWS, Engine, affordable_rows
from greenloop.engine.request import Request, Sampling
from greenloop.engine.steps import FreeSteps, NativeSteps
from greenloop.engine.stopping import Stopper
from greenloop.learn.packing import pack
from greenloop.learn.policy import Policy
from greenloop.types import Completion, Finish

PROMPTS = [
    tuple(torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist())
    for length in (5, 17, 9, 30)
]
# Frequent tokens as end tokens, so that rows retire at different times.
ENDS = frozenset(range(0, 300, 23))
WARM = Sampling(temperature=1.0, max_new_tokens=24)


def requests(samples: int = 5) -> list[Request]:
    return [Request(token_ids=prompt, samples=samples, seed=index) for index, prompt in enumerate(PROMPTS)]


def completions(engine: Engine | TransformersEngine, wanted: list[Request], sampling: Sampling = WARM) -> dict:
    return {(c.group, c.sample): c for c in engine.generate(wanted, sampling)}


def tokens(found: dict[tuple[int, int], Completion]) -> dict:
    return {key: (completion.token_ids, completion.finish) for key, completion in found.items()}


def lengths_of_forwards(engine: Engine, monkeypatch) -> list[int]:
    """Grows by the tokens of each forward of the engine's decoder."""
    lengths: list[int] = []
    embed = engine.decoder.embed

    def counted(token_ids):
        lengths.append(len(token_ids))
        return embed(token_ids)

    monkeypatch.setattr(engine.decoder, "embed", counted)
    return lengths


def test_greedy_tokens_equal_transformers_generate(tiny_model):
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        output = tiny_model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=sorted(ENDS)
        )
        expected.append(tuple(output[0, len(prompt) :].tolist()))
    engine = Engine(Decoder(tiny_model), Stopper(ByteText(), ENDS), rows=3)
    found = completions(engine, requests(1), Sampling(temperature=0, max_new_tokens=24))
    assert [found[index, 0].token_ids for index in range(len(PROMPTS))] == expected


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_samples_do_not_depend_on_how_many_decode_beside_them(tiny_model, rows: int):
    model = with_adapter(tiny_model)
    stopper = Stopper(ByteText(), ENDS)
    together = completions(Engine(Decoder(model), stopper, rows=64), requests())
    assert tokens(completions(Engine(Decoder(model), stopper, rows=rows), requests())) == tokens(together)
    assert len({len(completion.token_ids) for completion in together.values()}) > 3


def test_samples_do_not_depend_on_the_other_prompts(tiny_model):
    engine = Engine(Decoder(tiny_model), Stopper(ByteText(), ENDS), rows=8)
    together = completions(engine, requests())
    alone = completions(engine, [requests()[2]])
    assert tokens(alone) == {(0, k): tokens(together)[2, k] for k in range(5)}


@pytest.mark.parametrize(
    ("rows", "fixed"),
    [(1, False), (4, False), (64, False), (4, True), (0, False)],
    ids=["1 row", "4 rows", "64 rows", "4 rows in fixed shapes", "transformers"],
)
def test_greedy_answers_and_samples_of_one_prompt_in_one_call(tiny_model, rows: int, fixed: bool):
    stopper = Stopper(ByteText(), ENDS)
    warm = replace(WARM, temperature=0.7, top_k=40)
    greedy = [replace(request, samples=1, greedy=True) for request in requests()]
    # All greedy requests first: a prompt's two requests do not stand beside each other.
    both = [*greedy, *requests()]
    made = (
        Engine(Decoder(tiny_model), stopper, rows=rows, fixed=fixed)
        if rows
        else TransformersEngine(tiny_model, stopper)
    )
    together = completions(made, both, warm)
    alone = {
        **completions(made, requests(1), replace(warm, temperature=0)),
        **{(len(greedy) + group, k): one for (group, k), one in completions(made, requests(), warm).items()},
    }
    assert tokens(together) == tokens(alone)
    for key, completion in alone.items():
        assert together[key].logprobs == pytest.approx(completion.logprobs, abs=1e-4)


def test_requests_of_one_prompt_far_apart_need_no_further_slot(tiny_model):
    engine = Engine(Decoder(tiny_model), Stopper(ByteText(), ENDS), rows=1)
    first, second = requests(2)[:2]
    apart = completions(engine, [first, second, replace(first, seed=9, stop=("e",)), replace(second, samples=0)])
    assert sorted(apart) == [(group, k) for group in range(3) for k in range(2)]
    alone = completions(engine, [replace(first, seed=9, stop=("e",))])
    assert [tokens(apart)[2, k] for k in range(2)] == [tokens(alone)[0, k] for k in range(2)]


def test_a_prompt_that_several_requests_have_is_computed_once(tiny_model, monkeypatch):
    engine = Engine(Decoder(tiny_model), Stopper(ByteText(), ENDS), rows=2)
    lengths = lengths_of_forwards(engine, monkeypatch)
    twice = [Request(token_ids=PROMPTS[3], samples=2, seed=seed) for seed in (1, 2)]
    assert len(completions(engine, [*twice, *requests(1)[:1]])) == 5
    assert lengths.count(len(PROMPTS[3])) == 1
    assert lengths.count(len(PROMPTS[0])) == 1


def test_steps_in_fixed_shapes_draw_the_same_tokens(tiny_model):
    model = with_adapter(tiny_model)
    stopper = Stopper(ByteText(), ENDS)
    fixed = Engine(Decoder(model), stopper, rows=6, fixed=True)
    free = Engine(Decoder(model), stopper, rows=6)
    small = replace(WARM, max_new_tokens=7)
    caches = []
    for wanted, sampling in ((requests(2)[:1], small), (requests(1)[:1], small), (requests(), WARM)):
        expected = completions(free, wanted, sampling)
        found = completions(fixed, wanted, sampling)
        assert tokens(found) == tokens(expected)
        for key, completion in expected.items():
            assert found[key].logprobs == pytest.approx(completion.logprobs, abs=1e-4)
        caches.append(fixed._idle.cache)
    assert caches[0] is caches[1]
    assert caches[2].sizes["rows"] > caches[1].sizes["rows"]
    assert len({len(completion.token_ids) for completion in found.values()}) > 3


def rows_of_steps(monkeypatch) -> list[int]:
    """Grows by the rows of each decode step that is not in fixed shapes."""
    rows: list[int] = []
    for steps in (FreeSteps, NativeSteps):
        drawn = steps.drawn

        def counted(self, flying, draws, drawn=drawn):
            rows.append(len(flying.completions))
            return drawn(self, flying, draws)

        monkeypatch.setattr(steps, "drawn", counted)
    return rows


@pytest.mark.parametrize("rows", [3, 20])
def test_completions_are_one_row_until_they_differ(tiny_model, monkeypatch, rows: int):
    model = with_adapter(tiny_model)
    stopper = Stopper(ByteText(), ENDS)
    # Of two tokens, so that some draws agree and some do not.
    narrow = replace(WARM, top_k=2)
    expected = completions(Engine(Decoder(model), stopper, rows=rows, fixed=True), requests(), narrow)
    computed = rows_of_steps(monkeypatch)
    found = completions(Engine(Decoder(model), stopper, rows=rows), requests(), narrow)
    assert tokens(found) == tokens(expected)
    for key, completion in expected.items():
        assert found[key].logprobs == pytest.approx(completion.logprobs, abs=1e-4)
    assert max(computed) <= rows
    if rows == 20:
        # All are in flight from the start. A completion's last token needs no step.
        beginnings = [
            (group, one.token_ids[:end]) for (group, _), one in found.items() for end in range(1, len(one.token_ids))
        ]
        assert sum(computed) == len(set(beginnings)) < len(beginnings)


def test_equal_completions_take_one_row(tiny_model, monkeypatch):
    computed = rows_of_steps(monkeypatch)
    engine = Engine(Decoder(tiny_model), Stopper(ByteText(), frozenset()))
    found = completions(engine, [replace(requests(5)[1], greedy=True), replace(requests(1)[1], greedy=True)])
    assert len(found) == 6
    assert len(set(tokens(found).values())) == 1
    assert set(computed) == {1}


def test_a_cache_does_not_grow_beyond_the_memory(tiny_model):
    engine = Engine(Decoder(tiny_model), Stopper(ByteText(), ENDS), fixed=True)
    engine.memory = 400 * KVCache.bytes_per_token(engine.decoder)
    completions(engine, requests(9)[:1], replace(WARM, max_new_tokens=2))
    many = engine._idle.cache.sizes["rows"]
    completions(engine, requests(1)[3:], replace(WARM, max_new_tokens=200))
    assert engine._idle.cache.sizes["rows"] == 1 < many


def test_two_unfinished_calls_of_an_engine_do_not_share_a_cache(tiny_model):
    engine = Engine(Decoder(tiny_model), Stopper(ByteText(), ENDS), rows=6, fixed=True)
    # This one's cache is free when it has ended.
    alone = completions(engine, requests(3))
    others = [replace(request, seed=request.seed + 100) for request in reversed(requests(3))]
    alone_too = completions(engine, others)
    first, second = engine.generate(requests(3), WARM), engine.generate(others, WARM)
    pairs = list(zip(first, second, strict=True))
    for expected, found in ((alone, [one for one, _ in pairs]), (alone_too, [other for _, other in pairs])):
        assert tokens({(c.group, c.sample): c for c in found}) == tokens(expected)


def test_prompts_beyond_one_forward_are_computed_in_several(tiny_model, monkeypatch):
    stopper = Stopper(ByteText(), ENDS)
    together = completions(Engine(Decoder(tiny_model), stopper), requests())
    monkeypatch.setattr(FreeSteps, "prefill_tokens", 23)
    engine = Engine(Decoder(tiny_model), stopper)
    lengths = lengths_of_forwards(engine, monkeypatch)
    assert tokens(completions(engine, requests())) == tokens(together)
    assert lengths[:3] == [5 + 17, 9, 30]


def test_prompts_wait_for_others_to_be_computed_with(tiny_model, monkeypatch):
    """They end at different times, and none is computed alone; nor does any wait for others that do not come."""
    stopper = Stopper(ByteText(), ENDS)
    engine = Engine(Decoder(tiny_model), stopper, rows=16)
    kind = NativeSteps if engine.decoder.native else FreeSteps
    counts: list[int] = []
    prefill = kind.prefill

    def counted(self, first_slot, prompts):
        counts.append(len(prompts))
        return prefill(self, first_slot, prompts)

    monkeypatch.setattr(kind, "prefill", counted)
    wanted = [Request(token_ids=(number, *PROMPTS[0]), samples=1, seed=number) for number in range(61)]
    found = completions(engine, wanted)
    assert counts[0] == 16
    assert min(counts[:-1]) >= 4
    assert sum(counts) == 61
    alone = completions(Engine(Decoder(tiny_model), stopper, rows=1), wanted[-3:])
    assert [tokens(found)[58 + index, 0] for index in range(3)] == [tokens(alone)[index, 0] for index in range(3)]


def test_what_prompts_begin_with_in_common_is_computed_once(tiny_model, monkeypatch):
    stopper = Stopper(ByteText(), ENDS)
    shot = PROMPTS[3]
    prompts = [shot + PROMPTS[0], shot + PROMPTS[1], shot, PROMPTS[2], shot + PROMPTS[0][:2] + PROMPTS[2]]
    wanted = [Request(token_ids=prompt, samples=2, seed=index) for index, prompt in enumerate(prompts)]
    engine = Engine(Decoder(with_adapter(tiny_model)), stopper)
    lengths = lengths_of_forwards(engine, monkeypatch)
    together = completions(engine, wanted)
    if engine.decoder.native:
        assert lengths[0] == len({prompt[:end] for prompt in prompts for end in range(1, len(prompt) + 1)}) < 100
    for index, one in enumerate(wanted):
        alone = completions(engine, [one])
        assert [tokens(together)[index, k] for k in range(2)] == [tokens(alone)[0, k] for k in range(2)]


def test_rows_follow_the_memory_that_they_need(tiny_model):
    decoder = Decoder(tiny_model)
    one = 2 * 3 * 2 * decoder.head_width * 4
    assert KVCache.bytes_per_token(decoder) == one
    long = Sampling(max_new_tokens=CACHE_BYTES // one // 10)
    assert affordable_rows(decoder, requests(), long) == 9
    assert affordable_rows(decoder, [*requests(), *requests()], long) == 9
    assert affordable_rows(decoder, requests(), WARM) == MOST_ROWS
    assert affordable_rows(decoder, requests(), Sampling(max_new_tokens=CACHE_BYTES)) == 1


def test_a_long_prompt_takes_no_rows_from_the_others(tiny_model, monkeypatch):
    decoder = Decoder(with_adapter(tiny_model))
    engine = Engine(decoder, Stopper(ByteText(), ENDS))
    together = completions(engine, requests())
    # Memory for 4 rows beside the prompt of 30 tokens, for 6 beside the other three.
    engine.memory, engine.enough_rows = 4 * (30 + 24) * KVCache.bytes_per_token(decoder), 5
    assert affordable_rows(decoder, requests(), WARM, memory=engine.memory) == 4
    parts: list[list[int]] = []
    generated = engine._generated
    monkeypatch.setattr(
        engine, "_generated", lambda all_, part, *how: parts.append(part) or generated(all_, part, *how)
    )
    assert tokens(completions(engine, requests())) == tokens(together)
    assert parts == [[0, 1, 2], [3]]
    # Where nobody can have rows enough, the others still have far more of them alone.
    parts.clear()
    engine.enough_rows = 100
    assert tokens(completions(engine, requests())) == tokens(together)
    assert parts == [[0, 1, 2], [3]]
    # Without want of memory all are together.
    parts.clear()
    engine.memory = CACHE_BYTES
    assert tokens(completions(engine, requests())) == tokens(together)
    assert parts == [[0, 1, 2, 3]]


def test_sampler_logprobs_equal_the_trainers_with_a_nonzero_adapter(tiny_model):
    model = with_adapter(tiny_model)
    policy = Policy(model, 0.7)
    engine = Engine(Decoder(model), Stopper(ByteText(), ENDS), rows=6)
    found = completions(engine, requests(), Sampling(temperature=0.7, max_new_tokens=24))
    for group, prompt in enumerate(PROMPTS):
        chosen = [found[group, k] for k in range(5)]
        one = pack(prompt, [completion.token_ids for completion in chosen], range(5))
        sampled = torch.tensor([value for completion in chosen for value in completion.logprobs])
        torch.testing.assert_close(policy.logprobs([one])[0].logprobs.detach(), sampled, atol=1e-4, rtol=0)


def test_refresh_brings_the_adapters_new_values(tiny_model):
    model = with_adapter(tiny_model)
    engine = Engine(Decoder(model), Stopper(ByteText(), ENDS))
    before = completions(engine, requests())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-3)
    assert tokens(completions(engine, requests())) == tokens(before)
    engine.refresh()
    fresh = completions(Engine(Decoder(model), Stopper(ByteText(), ENDS)), requests())
    after = completions(engine, requests())
    assert tokens(after) == tokens(fresh) != tokens(before)


def test_fallback_engine_draws_the_same_tokens(tiny_model):
    model = with_adapter(tiny_model)
    stopper = Stopper(ByteText(), ENDS)
    slow = completions(TransformersEngine(model, stopper), requests())
    fast = completions(Engine(Decoder(model), stopper), requests())
    assert tokens(slow) == tokens(fast)
    for key, completion in slow.items():
        assert completion.logprobs == pytest.approx(fast[key].logprobs, abs=1e-4)


def test_an_unknown_architecture_gets_the_fallback_engine():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=300, n_positions=128)).eval()
    engine = make_engine(model, ByteText())
    assert isinstance(engine, TransformersEngine)
    assert len(completions(engine, requests(2))) == 8


def test_every_declared_end_token_stops(tiny_model):
    tiny_model.generation_config.eos_token_id = [30, 60]
    tiny_model.config.eos_token_id = 90
    assert Stopper.of(tiny_model, ByteText()).end_ids == {30, 60, 90, 257}


def test_finish_reasons_and_texts():
    stopper = Stopper(ByteText(), frozenset({257}))
    rule = Request(token_ids=(1,), samples=1, seed=0, stop=("[DONE]",))
    done = [ord(char) for char in "x = 1\n[DONE]"]
    assert stopper.finish(done, rule, 99) is Finish.STOP
    assert stopper.text(done, rule.stop) == "x = 1\n"
    assert stopper.finish(done[:-1], rule, 99) is None
    assert stopper.finish(done[:-1], rule, len(done) - 1) is Finish.LENGTH
    assert stopper.finish([65, 257], rule, 99) is Finish.EOS
    assert stopper.text([65, 257], ()) == "A"


def test_an_answer_that_is_whole_ends_at_its_line_end_only():
    stopper = Stopper(ByteText(), frozenset({257}))
    rule = Request(token_ids=(1,), samples=1, seed=0, ends=lambda text: text.endswith("```\n"))
    whole = [ord(char) for char in "```\nf\n```\n"]
    assert stopper.finish(whole, rule, 99) is Finish.STOP
    assert stopper.finish(whole[:-1], rule, 99) is None


def test_no_request_gives_no_completion(tiny_model):
    assert list(Engine(Decoder(tiny_model), Stopper(ByteText(), ENDS)).generate([], WARM)) == []
