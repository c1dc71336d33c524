"""Native code is tried before it is trusted, and left off where it is wrong."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from conftest import NO_NATIVE, tiny_llama
from greenloop import native_trial
from greenloop.decoder import Decoder, traces
from greenloop.decoder.native import Product, Rounded, Step, attention, narrow_of, rows, sums, team
from greenloop.native_trial import TOLERANCE, disagreement, load_and_try, try_native_code

if not team.available():
    pytest.skip(NO_NATIVE, allow_module_level=True)

from greenloop.decoder.native import rounded_tile


@pytest.fixture(autouse=True)
def untried(tmp_path, monkeypatch):
    """A machine on which the code has not been tried; it keeps what it has compiled."""
    mark = team._mark
    monkeypatch.setattr(team, "_mark", lambda what="right": tmp_path / what if what == "right" else mark(what))
    monkeypatch.setattr(team._Switch, "on", True)


def test_right_code_is_tried_once():
    said: list[str] = []
    assert not team.is_trusted()
    try_native_code(tiny_llama(), said.append)
    assert team.is_trusted()
    assert Decoder(tiny_llama()).native
    assert len(said) == 1
    assert "once: about a minute" in said[0]


def test_code_is_compiled_while_the_model_is_loaded(monkeypatch):
    done: list[str] = []
    monkeypatch.setattr(team, "begin", lambda: done.append("begun"))
    loaded = SimpleNamespace(model=tiny_llama(), dtype=torch.float32, device=torch.device("cpu"))
    monkeypatch.setattr(native_trial, "load_model", lambda source, **_: done.append(source) or loaded)
    monkeypatch.setattr(native_trial, "try_native_code", lambda model, say: done.append("tried"))
    assert load_and_try("spec", pytest.fail, dtype="auto", device="cpu") is loaded
    assert done == ["begun", "spec", "tried"]


@pytest.mark.parametrize(
    ("dtype", "pays", "lines"), [("float32", True, 0), ("float32", False, 1), ("bfloat16", True, 1)]
)
def test_a_precision_that_changes_nothing_is_spoken_of(dtype, pays, lines, monkeypatch):
    loaded = SimpleNamespace(model=tiny_llama(), dtype=getattr(torch, dtype), device=torch.device("cpu"))
    monkeypatch.setattr(native_trial, "load_model", lambda source, **_: loaded)
    monkeypatch.setattr(native_trial, "try_native_code", lambda model, say: None)
    monkeypatch.setattr(rounded_tile, "multiplies_pairs", lambda: pays)
    said: list[str] = []
    with native_trial.matmul_precision("high"):
        load_and_try("spec", said.append, dtype="auto", device="cpu")
        # What a run and its card say.
        assert native_trial.precision_of(loaded) == ("highest" if lines else "high")
    assert len(said) == lines
    assert all("changes nothing here" in line for line in said)


def test_trusted_code_is_not_tried_again(monkeypatch):
    team.trust()
    monkeypatch.setattr(native_trial, "disagreement", lambda: pytest.fail("tried again"))
    try_native_code(tiny_llama(), pytest.fail)


def test_rounding_is_far_from_what_is_called_wrong():
    assert 0 < disagreement() < TOLERANCE / 10


def test_wrong_code_is_left_off_in_one_sentence(monkeypatch):
    monkeypatch.setattr(native_trial, "disagreement", lambda: 1.2155)
    said: list[str] = []
    try_native_code(tiny_llama(), said.append)
    assert not team.is_trusted()
    assert not Decoder(tiny_llama()).native
    assert "off by 1)" in said[1]
    assert "several times slower" in said[1]


def wrong_product(monkeypatch):
    right = Product.__call__
    monkeypatch.setattr(Product, "__call__", lambda self, x: right(self, x) + 0.01)


def wrong_step(monkeypatch):
    right = Step.logits
    monkeypatch.setattr(Step, "logits", lambda *given: right(*given) + torch.linspace(0, 0.1, 304))


def wrong_attention(monkeypatch):
    right = attention.attend
    for place in ("greenloop.decoder.stack.attend", "greenloop.learn.attention.attention.attend"):
        monkeypatch.setattr(place, lambda *given: right(*given) * 1.01)


def wrong_gradient(monkeypatch):
    right = attention.attend_back
    monkeypatch.setattr("greenloop.learn.attention.attention.attend_back", lambda *given: right(*given) * 1.01)


def wrong_scales(monkeypatch):
    def twisted(weight):
        narrow = narrow_of(weight)
        return narrow and replace(narrow, scales=narrow.scales * 1.1)

    monkeypatch.setattr("greenloop.decoder.linear.narrow_of", twisted)


def wrong_rounded_product(monkeypatch):
    right = sums.multiply

    def twisted(x, weight, plus=None):
        return right(x, weight, plus) * (1.1 if isinstance(weight, Rounded) else 1.0)

    monkeypatch.setattr(rounded_tile, "multiplies_pairs", lambda: True)
    monkeypatch.setattr(sums, "multiply", twisted)


def wrong_kept_values(monkeypatch):
    right = traces.restored

    def twisted(values, places, pieces, out):
        right(values, places, pieces, out)
        out *= 1.1

    monkeypatch.setattr(rounded_tile, "multiplies_pairs", lambda: True)
    monkeypatch.setattr(traces, "restored", twisted)


def no_numbers(monkeypatch):
    right = rows.normed
    monkeypatch.setattr(rows, "normed", lambda *given: right(*given) * torch.nan)


@pytest.mark.parametrize(
    "break_it",
    [
        wrong_product,
        wrong_step,
        wrong_attention,
        wrong_gradient,
        wrong_scales,
        wrong_rounded_product,
        wrong_kept_values,
        no_numbers,
    ],
)
def test_each_part_is_looked_at(break_it, monkeypatch):
    break_it(monkeypatch)
    assert not disagreement() < TOLERANCE


def test_without_native_code_is_for_a_while():
    with team.without_native_code():
        assert not team.available()
    assert team.available()
