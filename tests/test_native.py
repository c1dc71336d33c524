"""Native code against PyTorch's operations: products, a whole decode step, the engine around it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import NO_NATIVE, ByteText, tiny_llama, tiny_qwen2, tiny_qwen3, with_adapter
from greenloop.decoder import Decoder, native
from greenloop.decoder.native import Narrow, Product, Step, Strips, Targets, blocks_of, lays_out, narrow_of, rows, sums
from greenloop.decoder.native import team as team_module
from greenloop.decoder.native.attention import Heads, Segments, attend, attend_back
from greenloop.decoder.native.layout import BESIDE, GROUP, LANES, MOST_SHORT, OUTPUTS, PANEL
from greenloop.engine.cache import BlockedCache, KVCache, PromptAttention, RowAttention
from greenloop.engine.generate import Engine
from greenloop.engine.request import Request, Sampling
from greenloop.engine.stopping import Stopper
from greenloop.native_trial import in_few_bits, matmul_precision, random_model

if not team_module.available():
    pytest.skip(NO_NATIVE, allow_module_level=True)

from numba import njit
from numba.core.ccallback import CFunc

from greenloop.decoder.native import rounded_tile
from greenloop.decoder.native.parts import round_spread
from greenloop.decoder.native.tile import _Form, _tile, _whole

Trees = list[list[tuple[int, int]]]

PROMPTS = [list(range(3, 36)), list(range(40, 47)), list(range(60, 76))]


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 12, 13, 40])
def test_a_product_equals_the_exact_one(rows: int):
    generator = torch.Generator().manual_seed(rows)
    for width, outputs in ((1, 16), (33, 50), (576, 320)):
        weight = torch.randn(outputs, width, generator=generator)
        x = torch.randn(rows, width, generator=generator)
        exact = x.double() @ weight.double().T
        found = Product(weight, blocks_of(weight))(x)
        assert (found.double() - exact).abs().max() < 1e-5 * max(1.0, float(exact.abs().max()))


def test_tiles_that_differ_in_the_order_of_their_rows_alone_are_not_one():
    """Attention's tiles and those of packed rows may have the same size."""
    plain, packed = (_tile(_Form(_whole, 12, 16, packed=order)) for order in (False, True))

    @njit
    def both(x: int, turned: int, weight: int, out: int, of_packed: int) -> None:
        plain(12, x, 7, weight, 64, 7, out, 16, 0, 0, 0, 0, 0)
        packed(12, turned, 12, weight, 64, 7, of_packed, 16, 0, 0, 0, 0, 0)

    x, weight = torch.randn(12, 7), torch.randn(7, 16)
    turned, out, of_packed = x.T.contiguous(), torch.empty(12, 16), torch.empty(12, 16)
    both(*(tensor.data_ptr() for tensor in (x, turned, weight, out, of_packed)))
    torch.testing.assert_close(out, x @ weight)
    torch.testing.assert_close(of_packed, x @ weight)


def test_a_product_with_bfloat16_weights_rounds_nothing_more():
    weight, x = torch.randn(48, 40).bfloat16(), torch.randn(7, 40).bfloat16()
    exact = x.double() @ weight.double().T
    assert (Product(weight, blocks_of(weight))(x).double() - exact).abs().max() < 1e-4


def test_what_is_laid_out_is_filled_up_with_zeros():
    weight = torch.arange(1.0, 37.0).reshape(18, 2)
    blocks = blocks_of(weight)
    assert blocks.shape == (-(-18 // OUTPUTS), 2, OUTPUTS)
    laid = blocks.transpose(1, 2).flatten(0, 1)
    assert torch.equal(laid[:18], weight)
    assert not laid[18:].any()
    assert lays_out(weight)
    assert not lays_out(weight.half())


def test_the_exponential_is_float32s():
    from greenloop.decoder.native.parts import exp

    x = np.linspace(-86.9, 87.9, 20001, dtype=np.float32)
    found = np.array([exp(value) for value in x])
    np.testing.assert_allclose(found, np.exp(x.astype(np.float64)), rtol=3e-7)
    assert exp(np.float32(-1e30)) < 1e-37
    assert np.isnan(exp(np.float32(np.nan)))


def pairs_of_logits(
    model: torch.nn.Module, steps: int = 18, ends: Sequence[int] = (3, 9)
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of nine rows over three prompts by PyTorch and by native code, step by step; rows move in between.

    After each of the steps `ends` there is a row less.
    """
    decoder = Decoder(model)
    decoder.pack(9)
    assert decoder.native
    sizes = {"rows": 9, "slots": 3, "prompt_tokens": 40, "new_tokens": steps + 2}
    plain, blocked = KVCache(decoder, **sizes), BlockedCache(decoder, **sizes)
    for strips in (blocked.prompts, blocked.own):
        assert (strips.scales is not None) == decoder.rounds
        for part in (strips.k, strips.v, strips.scales):
            if part is not None:
                part.fill_(torch.nan if part.is_floating_point() else torch.iinfo(part.dtype).min)
    lengths = [len(prompt) for prompt in PROMPTS]
    tokens = torch.tensor([token for prompt in PROMPTS for token in prompt])
    positions = torch.cat([torch.arange(length) for length in lengths])
    generator = torch.Generator().manual_seed(5)
    slots, own = [0, 2, 1, 0, 0, 0, 0, 1, 2], [0] * 9
    found = []
    with torch.inference_mode():
        for cache in (plain, blocked):
            decoder.forward(tokens, positions, PromptAttention(cache, 0, lengths))
        step = Step(decoder, blocked)
        for number in range(steps):
            last = torch.randint(0, 300, (len(own),), generator=generator)
            prompts, at, before = torch.tensor(lengths), torch.tensor(slots), torch.tensor(own)
            attend = RowAttention(plain, at, prompts, before)
            expected = decoder.logits(decoder.forward(last, prompts[at] + before, attend))
            found.append((expected.float(), step.logits(last.tolist(), own, slots, lengths)))
            own = [count + 1 for count in own]
            if number in ends:
                # The last row takes the place of row 1, as it does when a completion ends.
                for cache in (plain, blocked):
                    cache.copy_row(len(own) - 1, 1, lengths[slots[-1]], own[-1])
                slots[1], own[1] = slots.pop(), own.pop()
            if number == 12:
                for cache in (plain, blocked):
                    cache.move_slot(2, 0)
                    cache.move_slot(1, 2)
                slots, lengths = [{0: 0, 1: 2, 2: 0}[slot] for slot in slots], [lengths[2], 1, lengths[1]]
    return found


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_step_gives_the_decoders_logits(make, threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = pairs_of_logits(with_adapter(make()))
    finally:
        torch.set_num_threads(before)
    for expected, logits in found:
        assert expected.abs().max() > 0.5
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)


def test_a_step_reads_long_strips_several_blocks_at_a_time():
    found = pairs_of_logits(random_model(), steps=BESIDE * LANES + 3)
    for expected, logits in found:
        torch.testing.assert_close(logits, expected, atol=5e-5, rtol=2e-5)


@pytest.mark.parametrize("steps", [18, BESIDE * LANES + 3])
def test_a_step_reads_keys_and_values_of_16_bits(steps: int, monkeypatch):
    monkeypatch.setattr(rounded_tile, "multiplies_pairs", lambda: True)
    with matmul_precision("high"):
        found = pairs_of_logits(random_model(), steps=steps)
    differences = [(logits - expected).abs().mean() / expected.abs().mean() for expected, logits in found]
    assert 0 < min(differences) < max(differences) < 1e-3


def test_a_keys_codes_are_the_nearest_of_its_greatest_value():
    """Also of zeros and of next to nothing, which become zeros; what is no number makes no number of all."""

    @njit
    def rounded(values: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> None:
        round_spread(values, codes.ctypes.data, 3 * LANES, 2, scale.ctypes.data)

    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 9)[:, None]
    x[2], x[3], x[4, 5], x[5, 6] = 0.0, 1e-38, torch.nan, torch.inf
    for number, values in enumerate(x):
        spread, scale = np.zeros((4, 3 * LANES), dtype=np.int16), np.zeros(1, dtype=np.float32)
        rounded(values.numpy(), spread, scale)
        codes = spread[:, : 2 * LANES : 2].ravel().astype(float)
        assert not spread[:, 1::2].any()
        assert not spread[:, 2 * LANES :].any()
        if number in (4, 5):
            assert not np.isfinite(scale[0])
        elif number in (2, 3):
            assert not codes.any()
        else:
            assert np.abs(codes).max() == MOST_SHORT
            assert np.abs(codes * scale[0] - values.numpy()).max() <= 0.5001 * scale[0]


@pytest.mark.parametrize("rounds", [False, True])
def test_prompts_are_kept_where_their_strips_have_them(rounds: bool, monkeypatch):
    """Two of them that share a beginning, and what stood in their strips before where they have no tokens."""
    monkeypatch.setattr(rounded_tile, "multiplies_pairs", lambda: rounds)
    with matmul_precision("high"):
        decoder = Decoder(random_model())
    strips, places = Strips.empty(decoder, 4, 40), [list(range(33)), [*range(9), 40, 41]]
    for part in (strips.k, strips.v):
        part.fill_(7)
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(45, decoder.kv_heads, decoder.head_width, generator=generator)
    value = torch.randn(45, decoder.kv_heads * decoder.head_width + 5, generator=generator)[:, :-5]
    value = value.unflatten(1, (decoder.kv_heads, decoder.head_width))
    strips.keep(1, key, value, Targets.of(places, 2))
    strips.copy(2, 0, 33)
    for strip, tokens in ((2, places[0]), (3, places[1]), (0, places[0])):
        keys = strips.k[1, strip].transpose(2, 3).flatten(1, 2)
        values = strips.v[1, strip].transpose(1, 2).flatten(2)
        for number, (found, given) in enumerate(((keys, key), (values, value))):
            mine = found[:, : len(tokens)].transpose(0, 1).double()
            if strips.scales is not None:
                mine *= strips.scales[number, 1, strip, :, : len(tokens)].T[..., None]
            bound = 1e-4 if rounds else 0.0
            assert (mine - given[tokens].double()).abs().max() <= bound
    # Values of tokens that are not there, and strips that nothing was put into.
    assert (strips.v[1, 3, :, :, len(places[1]) :] == 7).all()
    assert (strips.v[1, 1] == 7).all()
    assert (strips.v[0, 2:] == 7).all()


def test_a_step_reads_bfloat16_weights_and_rounds_less_than_the_decoder():
    exact = pairs_of_logits(with_adapter(tiny_llama().bfloat16().float()))
    for (expected, logits), (whole, _) in zip(
        pairs_of_logits(with_adapter(tiny_llama().bfloat16())), exact, strict=True
    ):
        by_decoder, by_step = (expected - whole).abs().mean(), (logits - whole).abs().mean()
        assert 0 < by_step < by_decoder


def widened(narrow: Narrow, outputs: int) -> torch.Tensor:
    """The [out, in] weights that the codes stand for."""
    codes = narrow.codes
    if narrow.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1, 2)
    scales, offsets = (one.repeat_interleave(GROUP, dim=1) for one in (narrow.scales, narrow.offsets))
    return (codes * scales + offsets).transpose(1, 2).flatten(0, 1)[:outputs]


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_few_bits_are_found_and_kept_exactly(bits: int):
    weight = in_few_bits(torch.randn(50, 96, generator=torch.Generator().manual_seed(bits)), bits)
    weight[7, 32:64] = 0.0
    narrow = narrow_of(weight)
    assert narrow is not None
    assert narrow.bits == bits
    assert torch.equal(widened(narrow, 50), weight)
    weight[3, 40] += 1e-6
    assert narrow_of(weight) is None


@pytest.mark.parametrize(
    "weight", [torch.randn(8, 64), in_few_bits(torch.randn(8, 64), 4)[:, :40], torch.ones(8, 64).half()]
)
def test_other_weights_are_left_alone(weight: torch.Tensor):
    assert narrow_of(weight) is None


def test_a_step_computes_the_same_from_weights_in_few_bits(monkeypatch):
    decoder = Decoder(random_model())
    kinds = [linear.narrow and linear.narrow.bits for linear in (*decoder.layers[0].linears, decoder.lm_head)]
    assert kinds == [4, 4, 4, 4, 8]
    assert decoder.layers[1].qkv.narrow is None
    # With nine rows the weights may be read as they stand, with eight to three they are read as codes.
    ends = (3, 9, 13, 14, 15, 16)
    found = pairs_of_logits(random_model(), ends=ends)
    monkeypatch.setattr("greenloop.decoder.linear.narrow_of", lambda weight: None)
    for (_, narrow), (_, whole) in zip(found, pairs_of_logits(random_model(), ends=ends), strict=True):
        assert torch.equal(narrow, whole)


def test_models_with_norms_of_heads_and_machines_without_the_code_decode_in_pytorch(monkeypatch):
    assert not Decoder(tiny_qwen3()).native
    monkeypatch.setattr("greenloop.decoder.native.product.available", lambda: False)
    decoder = Decoder(tiny_llama())
    assert not decoder.native
    stopper = Stopper(ByteText(), frozenset({257}))
    requests = [Request(token_ids=tuple(prompt), samples=4, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    sampling = Sampling(max_new_tokens=20)
    without = {(one.group, one.sample): one for one in Engine(decoder, stopper).generate(requests, sampling)}
    monkeypatch.undo()
    decoder = Decoder(tiny_llama())
    assert decoder.native
    found = {(one.group, one.sample): one for one in Engine(decoder, stopper, rows=5).generate(requests, sampling)}
    assert {key: one.token_ids for key, one in found.items()} == {key: one.token_ids for key, one in without.items()}
    for key, one in without.items():
        assert found[key].logprobs == pytest.approx(one.logprobs, abs=1e-4)


def test_a_process_without_numba_says_that_it_is_missing():
    program = (
        "import sys, json; sys.modules['numba'] = None\n"
        "from greenloop.decoder.native.team import available\n"
        "print(json.dumps(available()))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) is False
    assert native.lays_out(torch.zeros(16, 2))


@pytest.fixture
def kept_code(monkeypatch):
    """Where code is kept, given the cache folder."""

    def at(cache: Path) -> Path:
        monkeypatch.setattr(team_module, "cache_dir", lambda: cache)
        return team_module._kept_code()

    monkeypatch.setattr(team_module, "_kept_code", team_module._kept_code.__wrapped__)
    return at


def test_code_is_kept_for_exactly_these_sources(kept_code, tmp_path):
    kept = kept_code(tmp_path / "cache")
    assert kept == kept_code(tmp_path / "cache")
    assert kept.parent == tmp_path / "cache" / "native"


def test_code_of_another_place_is_kept_apart(kept_code, tmp_path, monkeypatch):
    here = kept_code(tmp_path / "cache")
    copied = shutil.copytree(Path(team_module.__file__).parent, tmp_path / "native")
    monkeypatch.setattr(team_module, "__file__", str(copied / "team.py"))
    assert kept_code(tmp_path / "cache") != here


def test_code_of_another_processor_is_kept_apart(kept_code, tmp_path, monkeypatch):
    here = kept_code(tmp_path / "cache")
    monkeypatch.setattr("numba.config.CPU_NAME", "another")
    assert kept_code(tmp_path / "cache") != here


def test_code_that_cannot_be_kept_is_made_for_one_process(kept_code, tmp_path):
    (tmp_path / "file").touch()
    alone = kept_code(tmp_path / "file")
    assert alone.is_dir()
    assert alone.parent != tmp_path / "file"
    shutil.rmtree(alone)


COLD = """
import json, sys
from greenloop.decoder.native import team
team._PACKAGE, team._MODULES = "small", ("first", "second")
team._kept_code = lambda: team.Path(sys.argv[1])
if sys.argv[2:]:
    team.begin()
    assert team._makers.cache_info().currsize == 1
    if sys.argv[2] == "alone":
        sys.exit(max(maker.wait() for maker in team._makers()))
found = {name: team.compiled(name).called.cache_hits for name in team._MODULES}
assert team._makers.cache_info().misses <= 1
print(json.dumps([found, sorted(name for name in sys.modules if name.startswith("small."))]))
"""


@pytest.mark.parametrize("early", [[], ["early"]], ids=["on demand", "begun early"])
def test_the_process_that_finds_no_code_loads_it_as_later_ones_do(tmp_path, early):
    package, kept = tmp_path / "small", tmp_path / "kept"
    package.mkdir()
    kept.mkdir()
    (package / "__init__.py").touch()
    for name in ("first", "second"):
        source = "from numba import cfunc\n@cfunc('void(voidptr)', cache=True)\ndef called(argument): pass\n"
        (package / f"{name}.py").write_text(source)
    command = [sys.executable, "-c", COLD, str(kept)]
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    for more in (early, []):
        answer = subprocess.run([*command, *more], env=os.environ | paths, capture_output=True, text=True, check=True)
        assert json.loads(answer.stdout) == [{"first": 1, "second": 1}, ["small.first", "small.second"]]
    assert (kept / "first").is_file()
    assert (kept / "second").is_file()


def test_code_that_nobody_waited_for_is_not_made_again(tmp_path):
    package = tmp_path / "small"
    package.mkdir()
    for name in ("__init__", "first", "second"):
        (package / f"{name}.py").touch()
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    subprocess.run([sys.executable, "-c", COLD, str(tmp_path), "alone"], env=os.environ | paths, check=True)
    assert (tmp_path / "first").is_file()
    assert (tmp_path / "second").is_file()


def test_a_compiling_process_that_fails_is_not_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(team_module, "_PACKAGE", "no.such.package")
    monkeypatch.setattr(team_module, "_kept_code", lambda: tmp_path)
    monkeypatch.setattr(team_module, "_makers", functools.cache(team_module._makers.__wrapped__))
    with pytest.warns(RuntimeWarning, match=r"process of its own \(ModuleNotFoundError: No module named 'no'\)"):
        team_module._make()
    assert not any(tmp_path.iterdir())


def test_this_process_has_compiled_none_of_the_code():
    for name in team_module._MODULES:
        functions = [one for one in vars(team_module.compiled(name)).values() if isinstance(one, CFunc)]
        assert functions
        assert {one.cache_hits for one in functions} == {1}


def exact(x: torch.Tensor) -> torch.Tensor:
    return x.detach().double().requires_grad_()


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error, in shares of the largest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("count", [1, 5, 13, 200])
@pytest.mark.parametrize(("width", "outputs", "rank"), [(1, 3, 1), (33, 20, 5), (64, 96, 16), (PANEL + 76, 48, 24)])
def test_a_sum_of_products_equals_the_exact_one(count: int, width: int, outputs: int, rank: int):
    generator = torch.Generator().manual_seed(count)
    x, plus = (torch.randn(count, size, generator=generator) for size in (width, outputs))
    down = torch.randn(rank, width, generator=generator) / width**0.5
    whole = torch.randn(outputs, width + rank, generator=generator)
    weight, up = whole[:, :width], whole[:, width:]
    exact_low = x.double() @ down.double().T
    assert far(sums.multiply(x, weight), x.double() @ weight.double().T) < 1e-5
    assert far(sums.multiply(x, weight.bfloat16()), x.double() @ weight.bfloat16().double().T) < 1e-5
    summed = x.double() @ weight.double().T + exact_low @ up.double().T + plus.double()
    every = [(slice(0, rank), slice(0, width))], [(slice(0, rank), slice(0, outputs))]
    out, low = sums.project(x, weight, sums.LowRank.of(down, up, *every), plus)
    assert far(out, summed) < 1e-5
    assert far(low, exact_low) < 1e-5
    # The way back reads the same weights by their other side.
    assert far(sums.multiply(plus, weight.T), plus.double() @ weight.double()) < 1e-5
    assert far(sums.multiply(plus, weight.T.bfloat16()), plus.double() @ weight.bfloat16().double()) < 1e-5


@pytest.mark.parametrize("ranks", [(16, 16, 16), (8, 4, 8), (3, 20, 1)])
def test_ranks_for_some_outputs_alone_are_taken_to_those(ranks: tuple[int, ...]):
    """Forward B writes its own outputs, back it reads their gradients alone: nothing but zeros is left out."""
    generator = torch.Generator().manual_seed(sum(ranks))
    widths, inputs, rank = (96, 50, 34), 40, sum(ranks)
    low_ends, ends = torch.tensor(ranks).cumsum(0).tolist(), torch.tensor(widths).cumsum(0).tolist()
    parts = [
        (slice(low - one, low), slice(end - width, end))
        for one, low, width, end in zip(ranks, low_ends, widths, ends, strict=True)
    ]
    x, gradient = torch.randn(30, inputs, generator=generator), torch.randn(30, sum(widths), generator=generator)
    weight, down = (torch.randn(out, inputs, generator=generator) for out in (sum(widths), rank))
    up = torch.zeros(sum(widths), rank)
    for own, outputs in parts:
        up[outputs, own] = torch.randn(outputs.stop - outputs.start, own.stop - own.start, generator=generator)
    every = [(slice(0, rank), slice(0, inputs))]
    out, low = sums.project(x, weight, sums.LowRank.of(down, up, every, parts))
    assert far(low, x.double() @ down.double().T) < 1e-5
    assert far(out, x.double() @ (weight.double() + up.double() @ down.double()).T) < 1e-5
    back, low = sums.project(gradient, weight.T, sums.LowRank.of(up.T, down.T, parts, every))
    assert far(low, gradient.double() @ up.double()) < 1e-5
    assert far(back, gradient.double() @ (weight.double() + up.double() @ down.double())) < 1e-5


@pytest.mark.parametrize("count", [1, 128, 300])
def test_products_over_the_rows_equal_the_exact_ones(count: int):
    generator = torch.Generator().manual_seed(count)
    table = torch.randn(count, 200, generator=generator)
    # Columns of a wider table: whole blocks, and fewer than one at its end.
    pairs = [(table[:, :3], table[:, 8:104]), (table[:, 100:120], table[:, 50:]), (table[:, 7:8], table[:, 199:])]
    for (thin, wide), found in zip(pairs, sums.outer(pairs), strict=True):
        assert far(found, thin.double().T @ wide.double()) < 1e-5


def test_the_passes_over_rows_are_what_autograd_says():
    generator = torch.Generator().manual_seed(0)
    x, weight, plus = torch.randn(40, 50, generator=generator), torch.rand(50, generator=generator), torch.ones(40, 50)
    outer = torch.randn(40, 50, generator=generator)
    known = exact(x)
    normed = torch.nn.functional.rms_norm(known, (50,), weight.double(), 1e-5)
    normed.backward(outer.double())
    again, found = rows.normed_back(x, weight, 1e-5, outer, plus)
    assert far(rows.normed(x, weight, 1e-5), normed.detach()) < 1e-6
    assert far(again, normed.detach()) < 1e-6
    assert far(found, known.grad + plus) < 1e-6

    known, outer = exact(x), outer[:, :25].contiguous()
    gate, up = known.chunk(2, dim=1)
    gated = torch.nn.functional.silu(gate) * up
    gated.backward(outer.double())
    again, found = rows.gated_back(x, outer)
    assert far(rows.gated(x), gated.detach()) < 1e-6
    assert far(again, gated.detach()) < 1e-6
    assert far(found, known.grad) < 1e-6


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_entropy_and_slope_are_what_autograd_says(temperature: float):
    logits = 8 * torch.randn(30, 1000, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(30) * 33
    logits[3, 99] = 90.0
    known = exact(logits)
    scores = (known / temperature).log_softmax(dim=-1)
    chosen = scores.gather(1, labels[:, None]).squeeze(1)
    chosen.sum().backward()
    entropy = -(scores.exp() * scores).sum(dim=-1).detach()
    untouched = logits.clone()
    for slope in (False, True):
        logprobs, found = rows.judged(untouched.clone() if not slope else logits, labels, temperature, slope=slope)
        torch.testing.assert_close(logprobs, chosen.detach().float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found, entropy.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, known.grad.float(), atol=1e-6, rtol=1e-4)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def attended(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, trees: Trees) -> torch.Tensor:
    """Attention over all N tokens at once, with one mask that says who sees whom."""
    split = [heads.query, heads.kv, heads.kv]
    query, key, value = qkv.unflatten(1, (-1, heads.width)).split(split, dim=1)
    query, key = turned(query, cos, sin) * heads.scale, turned(key, cos, sin)
    sees = torch.zeros(len(qkv), len(qkv), dtype=torch.bool)
    token = 0
    for tree in trees:
        last: list[int] = []
        for number, (tokens, parent) in enumerate(tree):
            if number:
                sees[token : token + tokens] = sees[last[parent]]
            sees[token : token + tokens, token : token + tokens] = torch.ones(tokens, tokens).tril().bool()
            token += tokens
            last.append(token - 1)
    times = heads.query // heads.kv
    key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
    scores = torch.einsum("nhd,mhd->hnm", query, key).masked_fill(~sees, float("-inf"))
    return torch.einsum("hnm,mhd->nhd", scores.softmax(dim=-1), value).flatten(1)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("shape", "trees"),
    [
        ((9, 3, 64), [[(40, 0), (35, 0), (0, 0), (70, 0), (1, 0)], [(7, 0), (3, 0)]]),
        ((4, 4, 16), [[(1, 0), (1, 0), (2, 0)]]),
        ((2, 1, 32), [[(5, 0)], [(130, 0), (40, 0)]]),
        ((14, 2, 64), [[(33, 0), (64, 0), (65, 0)]]),
        ((9, 3, 64), [[(21, 0), (40, 0), (3, 0), (17, 1), (1, 1), (50, 3), (2, 3), (30, 2)], [(4, 0), (9, 0), (9, 1)]]),
    ],
)
def test_attention_and_its_gradient_are_what_autograd_says(shape, trees, threads: int):
    heads = Heads(*shape, scale=0.3)
    tokens = sum(tokens for tree in trees for tokens, _ in tree)
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(tokens, (heads.query + 2 * heads.kv) * heads.width, generator=generator)
    angle = 6 * torch.rand(tokens, 1, heads.width // 2, generator=generator)
    outer = torch.randn(tokens, heads.query * heads.width, generator=generator)
    known = exact(qkv)
    expected = attended(known, angle.double().cos(), angle.double().sin(), heads, trees)
    expected.backward(outer.double())
    where = (angle.cos(), angle.sin(), heads, Segments.of(trees))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, gradient = attend(qkv, *where), attend_back(qkv, *where, outer)
    finally:
        torch.set_num_threads(before)
    assert far(found, expected.detach()) < 2e-6
    assert far(gradient, known.grad) < 2e-6


def test_log_probs_of_what_is_not_a_number_are_none():
    logits = torch.zeros(2, 40)
    logits[1, 7] = float("nan")
    logprobs, _ = rows.judged(logits, torch.zeros(2, dtype=torch.int64), 1.0, slope=True)
    assert logprobs[0].isfinite()
    assert logprobs[1].isnan()
