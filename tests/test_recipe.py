"""Recipes: every refusal names the key's path, and what is saved reads back."""

import tomllib
from pathlib import Path

import pytest

from greenloop.errors import ConfigError
from greenloop.recipe import Recipe, describe_keys, load_recipe, shipped_recipes, to_toml, validated


def test_shipped_recipes_are_valid_and_read_back_equal():
    assert {"starter", "mbpp-smollm2-135m", "mbpp-smollm2-360m"} <= set(shipped_recipes())
    for name in shipped_recipes():
        recipe = load_recipe(name)
        assert validated(tomllib.loads(to_toml(recipe)), name) == recipe


def test_overrides_are_toml_values_or_plain_words():
    recipe = load_recipe(
        "starter", ["sampling.max_new_tokens=200", "model=org/name", 'lora.targets=["q_proj"]', "reward.clip=[-1, 1]"]
    )
    assert recipe.sampling.max_new_tokens == 200
    assert recipe.model == "org/name"
    assert recipe.lora.targets == ["q_proj"]
    assert recipe.reward.clip == (-1, 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.temprature=1", r"sampling\.temprature: unknown key; did you mean sampling\.temperature\?"),
        ("samples=1", r"samples: .*greater than or equal to 2.*\(got 1\)"),
        ("sampling.top_p=0.9", r"sampling\.accept_bias"),
        ("steps=many", r"steps: .*integer"),
        ("steps", "expected key=value"),
        ("seed.x=1", "seed is a value, not a section"),
        ("evaluation.every=5", r"evaluation\.validation_tasks"),
        ("reward.clip=[1, -1]", r"reward: clip must be \[low, high\]"),
        ("prompt.shown_tests=-1", "shown_tests must be"),
    ],
)
def test_refusals_name_the_key(override: str, message: str):
    settings = ["seed=1", override] if override.startswith("seed.") else [override]
    with pytest.raises(ConfigError, match=message):
        load_recipe("starter", settings)


def test_masking_truncated_completions_needs_beta_0():
    with pytest.raises(ConfigError, match="mask_truncated"):
        load_recipe("starter", ["rloo.mask_truncated=true", "beta=0.1"])


def test_a_missing_recipe_names_those_there_are(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nothing: no recipe of this name; shipped are .*starter"):
        load_recipe("nothing")
    with pytest.raises(ConfigError, match="no such recipe file"):
        load_recipe(str(tmp_path / "x.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("steps = = 3")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_recipe(str(broken))


def test_every_key_says_what_it_means():
    lines = list(describe_keys())
    assert len(lines) > 50
    assert not [line for line in lines if line.endswith(": None")]


def test_shown_tests_translate_to_a_count():
    assert Recipe().prompt.shown is None
    assert load_recipe("starter", ["prompt.shown_tests=1"]).prompt.shown == 1
