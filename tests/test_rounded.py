"""Products of values in 14 bits: what they compute, and what a decoder makes of them."""

from __future__ import annotations

import pytest
import torch

from conftest import NO_NATIVE, tiny_llama, tiny_qwen2, tiny_qwen3, with_adapter
from greenloop import native_trial
from greenloop.decoder import Decoder
from greenloop.decoder.native import Rounded, sums, team
from greenloop.decoder.native.layout import GROUP, GROUP_LINES, MOST_CODE, PANEL
from greenloop.decoder.native.rounded import rounded
from greenloop.decoder.traces import Traces
from greenloop.learn.policy import Policy, adapt
from greenloop.native_trial import matmul_precision
from greenloop.recipe import LoraSection

if not team.available():
    pytest.skip(NO_NATIVE, allow_module_level=True)

from numba import njit, types
from numba.extending import intrinsic

from greenloop.decoder.native import rounded_tile


@pytest.fixture
def allowed(monkeypatch):
    """Products may be rounded, on a processor where it would not pay as well."""
    monkeypatch.setattr(rounded_tile, "multiplies_pairs", lambda: True)
    with matmul_precision("high"):
        yield


def parts_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, groups, GROUP] and scales [N, groups] of rounded rows."""
    lines = rounded(x).unflatten(1, (-1, GROUP_LINES))
    codes = lines[..., :-1].contiguous().view(torch.int16)
    return codes, lines[..., -1].contiguous().view(torch.float32)


def values_of(x: torch.Tensor) -> torch.Tensor:
    """[N, in] float64: what rounded rows stand for."""
    codes, scales = parts_of(x)
    return (codes.double() * scales.double()[..., None]).flatten(1)


def test_a_groups_largest_value_has_the_largest_code_and_the_others_their_nearest():
    x = torch.randn(11, 5 * GROUP, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 11)[:, None]
    codes, scales = parts_of(x)
    assert torch.equal(codes.abs().amax(-1), torch.full((11, 5), MOST_CODE, dtype=torch.int16))
    assert torch.equal(codes.flatten(1).sign(), (x / scales.repeat_interleave(GROUP, 1)).round().sign().short())
    error = (values_of(x) - x.double()).abs().unflatten(1, (-1, GROUP)).amax(-1)
    assert (error <= 0.5001 * scales).all()


def test_groups_of_zeros_and_of_next_to_nothing_are_zeros():
    x = torch.zeros(2, GROUP)
    x[1] = 1e-38
    assert torch.equal(parts_of(x)[0], torch.zeros(2, 1, GROUP, dtype=torch.int16))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none(value: float):
    x = torch.randn(3, 2 * GROUP)
    x[1, 40] = value
    out = sums.multiply(x, Rounded.of(torch.randn(50, 2 * GROUP)))
    assert not out[1].isfinite().any()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("count", [1, 3, 8, 9, 40])
@pytest.mark.parametrize(("inputs", "outputs"), [(GROUP, 16), (96, 50), (PANEL + 96, 100)])
def test_a_product_is_that_of_the_rounded_values(count: int, inputs: int, outputs: int):
    generator = torch.Generator().manual_seed(count)
    x, weight, plus = (torch.randn(size, generator=generator) for size in
                       ((count, inputs), (outputs, inputs), (count, outputs)))  # fmt: skip
    factor = Rounded.of(weight)
    assert factor is not None
    exact = values_of(x) @ values_of(weight).T
    for start, found in ((0, sums.multiply(x, factor)), (plus, sums.multiply(x, factor, plus))):
        assert (found - exact - start).abs().max() < 1e-6 * exact.abs().max()
    # The other way round the weight lies in columns.
    back = Rounded.of(weight.T)
    assert (back is None) == (outputs % GROUP > 0)
    assert (sums.multiply(x, factor) - x @ weight.T).abs().max() < 1e-3 * exact.abs().max()


def test_the_largest_sum_of_a_group_is_exact():
    """32 products of the largest codes are just below 2 ** 31."""
    for sign in (1.0, -1.0):
        x, weight = torch.ones(8, 2 * GROUP), torch.full((48, 2 * GROUP), sign)
        torch.testing.assert_close(sums.multiply(x, Rounded.of(weight)), x @ weight.T, rtol=1e-6, atol=0)


def test_low_ranks_beside_a_rounded_weight_are_as_exact_as_ever():
    generator = torch.Generator().manual_seed(3)
    x, weight, down, up = (torch.randn(size, generator=generator) for size in ((20, 96), (64, 96), (20, 96), (64, 20)))
    path = sums.LowRank.of(down, up, [(slice(0, 20), slice(0, 96))], [(slice(0, 20), slice(0, 64))])
    out, low = sums.project(x, Rounded.of(weight), path)
    torch.testing.assert_close(low, x @ down.T, rtol=1e-5, atol=1e-5)
    expected = values_of(x) @ values_of(weight).T + ((x @ down.T) @ up.T).double()
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("features", [set(), {"avx2", "avx512bw"}, rounded_tile._FEATURES])
def test_pairs_are_multiplied_alike_with_and_without_an_instruction_for_it(features: set[str], monkeypatch):
    """Sums of two products of 16-bit integers, one such pair in each of a vector's 32-bit places."""
    monkeypatch.setattr(rounded_tile, "_FEATURES", features & rounded_tile._FEATURES)
    vector = rounded_tile.VECTOR

    @intrinsic
    def dot(typing, x, weights, out):
        def emit(context, builder, signature, arguments):
            kind = rounded_tile._INTEGERS.as_pointer()
            x, weights, out = (builder.inttoptr(address, kind) for address in arguments)
            total = rounded_tile._dot_of(builder)(*(builder.load(one, align=4) for one in (out, x, weights)))
            builder.store(total, out, align=4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 3), emit

    @njit
    def compute(x: int, weights: int, out: int) -> None:
        dot(x, weights, out)

    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randint(-MOST_CODE, MOST_CODE + 1, (vector, 2), generator=generator) for _ in range(2))
    out = torch.arange(vector, dtype=torch.int32)
    given = [one.short().contiguous() for one in (x, weights)]
    compute(*(one.data_ptr() for one in (*given, out)))
    assert torch.equal(out.long(), torch.arange(vector) + (x * weights).sum(1))


@pytest.mark.usefixtures("allowed")
def test_sampler_and_trainer_round_alike_and_little():
    """What the sampler says of its tokens, what an update takes from it, what it computes, and the exact values."""
    model = native_trial.random_model()
    policy = Policy(model, 1.0)
    assert policy.decoder.rounds
    policy.remember(2**26)
    packs, drawn = native_trial._sampled(policy)
    replayed = native_trial.slopes(policy, packs)
    policy.refresh()
    computed = native_trial.slopes(policy, packs)
    with matmul_precision("highest"):
        plain = Policy(model, 1.0)
    assert not plain.decoder.rounds
    exact = native_trial.slopes(plain, packs)
    assert (drawn - replayed[0]).abs().mean() < 1e-4
    assert (drawn - computed[0]).abs().mean() < 3e-4
    assert 1e-5 < (drawn - exact[0]).abs().mean() < 2e-3
    for found in (replayed, computed):
        for one, other in zip(found[1], exact[1], strict=True):
            assert (one - other).norm() < 5e-3 * other.norm()
    references = [torch.cat(one.reference_logprobs(packs)) for one in (policy, plain)]
    assert 1e-5 < (references[0] - references[1]).abs().mean() < 2e-3


@pytest.mark.usefixtures("allowed")
def test_what_is_kept_for_an_update_is_rounded_but_for_odd_widths_and_what_log_probs_are_made_of():
    decoder = Decoder(native_trial.random_model())
    traces = Traces(decoder, 2**22)
    generator = torch.Generator().manual_seed(5)
    first, odd = torch.randn(7, 96, generator=generator), torch.randn(7, 12, generator=generator)
    traces.keep(1, "middle", 2, first)
    traces.keep(1, "low_qkv", 2, odd)
    traces.last()[2:9] = first
    places = torch.tensor([8, 2, 4])
    found = traces.layer(1, places, torch.empty(3, traces.layer_width))
    assert (found["middle"] - values_of(first)[places - 2]).abs().max() < 1e-6
    assert not torch.equal(found["middle"], first[places - 2])
    assert torch.equal(found["low_qkv"], odd[places - 2])
    assert torch.equal(traces.last()[places], first[places - 2])
    with matmul_precision("highest"):
        whole = Traces(Decoder(native_trial.random_model()), 2**22)
    assert len(traces.values) > 1.7 * len(whole.values)


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_qwen3])
def test_every_family_samples_and_learns_with_rounded_products(make):
    """Also with widths that make no whole groups (80 inputs), whose products stay exact."""
    model = with_adapter(make())
    decoder = Decoder(model)
    assert decoder.layers[0].gate_up.rounded() is not None
    assert decoder.layers[0].down.rounded() is None
    hidden = torch.randn(9, 96, generator=torch.Generator().manual_seed(1))
    with matmul_precision("highest"):
        exact = Decoder(model)
    for rows in (1, 9):
        decoder.pack(rows)
        for name in ("qkv", "output", "gate_up"):
            one, other = (getattr(which.layers[1], name)(hidden) for which in (decoder, exact))
            assert 0 < (one - other).norm() < 1e-3 * other.norm()
    assert (decoder.logits(hidden) - exact.logits(hidden)).norm() < 1e-3 * exact.logits(hidden).norm()


def test_by_default_nothing_is_rounded(monkeypatch):
    monkeypatch.setattr(rounded_tile, "multiplies_pairs", lambda: True)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not Policy(adapt(tiny_llama(), LoraSection(rank=4, alpha=8), 0, "tiny"), 1.0).decoder.rounds
    with matmul_precision("high"):
        monkeypatch.setattr(rounded_tile, "multiplies_pairs", lambda: False)
        assert not Decoder(tiny_llama()).rounds
