"""The model card: its metadata is valid, its numbers are the run's, and its quick start runs as printed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from peft import LoraConfig, get_peft_model

from conftest import tiny_llama
from greenloop.card import quick_start, read_run, render_card, write_card
from greenloop.compare import compare_records, comparison_record
from greenloop.errors import RunError
from greenloop.models import PACKAGED
from greenloop.recipe import Recipe, to_toml
from greenloop.results import evaluation_record
from test_evaluate import BETTER, FOUR, evaluated

RECIPE = Recipe(
    model="smollm2-135m",
    steps=3,
    seed=7,
    sampling={"max_new_tokens": 24, "temperature": 0.9},
    lora={"rank": 4, "alpha": 8},
    reward={"ran": 0.1, "well_formed": 0.1},
)
STARTER = {"spec": "starter:train", "sha256": "cd" * 32, "source": "the package", "hub_id": "", "licence": "Apache-2.0"}
MBPP = {
    **STARTER,
    "spec": "mbpp:train",
    "source": "/home/someone/mbpp.jsonl",
    "hub_id": "google-research-datasets/mbpp",
}
ENVIRONMENT = {
    "greenloop": "0.1.0",
    "python": "3.11.9",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "platform": "Linux",
    "cpu": "a CPU",
    "cores": 2,
    "device": "cpu",
    "dtype": "float32",
    "model": {
        "spec": "smollm2-135m",
        "base_name": f"/cache/gguf/{PACKAGED.sha256}-1",
        "weights_sha256": PACKAGED.sha256,
        "licence": "Apache-2.0",
    },
    "tasks": STARTER,
    "eval_tasks": {**STARTER, "spec": "starter:test"},
    "sandbox_level": "full",
    "seed": 7,
}
STEP = {"pass_rate": 0.25, "reward": 0.3, "outcomes": {"passed": 1}, "tokens": 1000, "seconds": {"total": 60.0}}


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory, byte_tokenizer) -> Path:
    """A tiny random base, saved, with an adapter on it as training saves one."""
    folder = tmp_path_factory.mktemp("models")
    tiny_llama().save_pretrained(folder / "base")
    byte_tokenizer.save_pretrained(folder / "base")
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        policy = get_peft_model(tiny_llama(), config)
    policy.peft_config["default"].base_model_name_or_path = str(folder / "base")
    policy.save_pretrained(folder / "adapter")
    byte_tokenizer.save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.fixture
def run_dir(tmp_path, adapter_folder, byte_tokenizer) -> Path:
    """A finished run with everything that a card is made of."""
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    (folder / "adapter").symlink_to(adapter_folder)
    (folder / "recipe.toml").write_text(to_toml(RECIPE))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    steps = [json.dumps({"step": step, **STEP, "pass_rate": 0.1 * step}) for step in range(7)]
    (folder / "journal.jsonl").write_text("\n".join(steps) + '\n{"step": 7, "pass')
    before = evaluation_record(evaluated(byte_tokenizer, FOUR), ENVIRONMENT)
    after = evaluation_record(evaluated(byte_tokenizer, BETTER), ENVIRONMENT)
    difference = comparison_record(compare_records(before, after))
    (folder / "results.json").write_text(json.dumps({"before": before, "after": after, "difference": difference}))
    return folder


def changed(run_dir: Path, **environment) -> Path:
    """The run with some of its environment replaced."""
    (run_dir / "environment.json").write_text(json.dumps({**ENVIRONMENT, **environment}))
    return run_dir


def code_of(card: str) -> str:
    """The card's one Python block."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    return code


def run_block(code: str, folder: Path) -> str:
    """What the code prints, offline, in a folder that is not the run's."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_quick_start_runs_as_printed(run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(run_dir.parent)
    card = write_card(Path("first")).read_text()
    code = code_of(card)
    assert f'adapter = "{(run_dir / "adapter").resolve()}"' in code
    assert "max_new_tokens=24" in code
    assert run_block(code, tmp_path).strip()


def test_the_quick_start_asks_what_training_asked(run_dir, byte_tokenizer):
    # Everything before the tensors: the messages as the program builds them.
    code = quick_start(RECIPE, "x").split("inputs =")[0].split("fence =")[1]
    names: dict[str, object] = {}
    exec("fence =" + code, names)
    system, user = names["messages"]
    assert system == {"role": "system", "content": "You are an expert Python programmer."}
    assert user["content"].startswith("Write a function to count the vowels in a word.\n\nYour code should pass these")
    assert user["content"].endswith("Answer with one ```python block.")


def test_a_plain_text_protocol_has_a_plain_text_quick_start(adapter_folder, tmp_path):
    recipe = Recipe(prompt={"protocol": "mbpp-3shot"}, sampling={"max_new_tokens": 16})
    code = quick_start(recipe, str(adapter_folder))
    assert "apply_chat_template" not in code
    assert run_block(code, tmp_path).strip()


def test_metadata_is_valid_and_survives_a_round_trip(run_dir):
    path = write_card(run_dir)
    data = ModelCard.load(path).data
    base = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (data.base_model, data.library_name, data.pipeline_tag) == (base, "peft", "text-generation")
    assert data.license == "apache-2.0"
    assert {f"base_model:adapter:{base}", "lora", "rloo", "transformers"} <= set(data.tags)
    greedy, sampled = data.eval_results
    assert (greedy.metric_type, greedy.metric_value) == ("pass@1", 1.0)
    assert greedy.metric_name == "pass@1, greedy (before training: 0.3333)"
    assert sampled.metric_value == pytest.approx(7 / 12, abs=1e-4)
    assert sampled.metric_args["before_training"] == 0.25
    assert sampled.metric_args["low_95"] < sampled.metric_value < sampled.metric_args["high_95"]
    raw = metadata_load(path)
    assert "datasets" not in raw
    assert raw["model-index"][0]["name"] == "first"
    assert raw["base_model_relation"] == "adapter"


def test_the_results_table_is_the_measured_one(run_dir):
    card = write_card(run_dir).read_text()
    results = json.loads((run_dir / "results.json").read_text())
    paired = results["difference"]["sampled"]["pass_at_1"]
    row = next(line for line in card.splitlines() if line.startswith("| pass@1, sampled"))
    assert row.startswith("| pass@1, sampled | 25.0 % [")
    assert "| 58.3 % [" in row
    assert f"+33.3 points [{100 * paired['low']:+.1f}, {100 * paired['high']:+.1f}]" in row
    assert "| passes among those, sampled | 50.0 % [" in card
    assert "4 samples a task at temperature 0.7; seed 3." in card
    assert "Hardware: a CPU, 2 cores, device cpu, dtype float32." in card


def test_the_card_says_how_the_adapter_was_trained(run_dir):
    card = write_card(run_dir).read_text()
    # Seven whole lines, and one that a kill cut short.
    assert "Steps run: 7, in 7.0 minutes on a CPU" in card
    assert "7,000 tokens" in card
    assert "Pass rate in training, mean over 5 steps: 20.0 % first, 40.0 % last." in card
    assert "| LoRA | rank 4, alpha 8, dropout 0, all-linear |" in card
    assert "| reward | 1 passed + 0.1 ran + 0.1 well_formed |" in card
    assert len(re.search(r"```text\n(.*?)\n```", card, re.DOTALL).group(1).splitlines()) == 4
    assert "torch 2.13.0, transformers 5.23.0, peft 0.21.2" in card
    for paper in ("2402.14740", "2108.07732", "2106.09685", "https://github.com/huggingface/peft"):
        assert paper in card


def test_the_card_says_what_of_the_adapter_was_kept(run_dir):
    kept = RECIPE.model_copy(update={"lora": RECIPE.lora.model_copy(update={"interpolation": 0.7})})
    (run_dir / "recipe.toml").write_text(to_toml(kept))
    row = "all-linear; 0.7 of what was trained is kept (interpolation with the base) |"
    assert row in write_card(run_dir).read_text()


def test_the_card_says_what_was_done_and_not_what_was_planned(run_dir):
    card = write_card(run_dir).read_text()
    assert "| steps | 7 of 3 |" in card
    assert "| tasks of a step | every task once an epoch |" in card
    recipe = RECIPE.model_copy(update={"steps": 7, "curriculum": RECIPE.curriculum.model_copy(update={"probe": 4})})
    (run_dir / "recipe.toml").write_text(to_toml(recipe))
    card = write_card(run_dir).read_text()
    assert "| steps | 7 |" in card
    assert "after a probe of 4 samples a task |" in card
    assert "The curriculum chooses the tasks, so this is not the rate on the set." in card


def test_a_card_of_a_gguf_base_says_what_the_adapter_fits(run_dir):
    assert "fits the dequantised Q4_1 weights" in write_card(run_dir).read_text()
    hub = {**ENVIRONMENT["model"], "spec": "org/model", "base_name": "org/model", "weights_sha256": "f" * 40}
    card = write_card(changed(run_dir, model=hub)).read_text()
    assert "dequantised" not in card
    assert metadata_load(run_dir / "adapter" / "README.md")["base_model"] == "org/model"


def test_public_tasks_are_named_and_their_contamination_too(run_dir):
    path = write_card(changed(run_dir, tasks=MBPP))
    card = path.read_text()
    assert metadata_load(path)["datasets"] == ["google-research-datasets/mbpp"]
    assert "public since 2021" in card
    assert "MBPP's test split (11-510)" in card
    assert "from mbpp.jsonl" in card
    assert "/home/someone" not in card


def test_what_is_not_known_is_left_out_of_the_metadata(run_dir):
    model = {"spec": "models/mine", "base_name": "/models/mine", "weights_sha256": "ab", "licence": ""}
    (run_dir / "results.json").unlink()
    (run_dir / "journal.jsonl").unlink()
    path = write_card(changed(run_dir, model=model))
    raw = metadata_load(path)
    assert raw.keys() == {"library_name", "pipeline_tag", "tags"}
    assert not any(tag.startswith("base_model") for tag in raw["tags"])
    assert "This run was not evaluated." in path.read_text()


def test_a_hub_id_takes_the_folders_place_in_the_quick_start(run_dir):
    card = render_card(read_run(run_dir), "me/adapter")
    assert 'adapter = "me/adapter"' in code_of(card)
    assert str(run_dir) not in card


@pytest.mark.parametrize("name", ["recipe.toml", "environment.json"])
def test_a_folder_that_lacks_a_file_is_one_sentence_and_keeps_its_card(run_dir, name):
    before = write_card(run_dir).read_text()
    (run_dir / name).unlink()
    with pytest.raises(RunError, match=re.escape(name)):
        write_card(run_dir)
    assert (run_dir / "adapter" / "README.md").read_text() == before


def test_a_run_without_an_adapter_is_one_sentence(tmp_path):
    with pytest.raises(RunError, match=r"adapter_config\.json cannot be read"):
        write_card(tmp_path)
