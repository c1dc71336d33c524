"""The whole line on a tiny random model: files, resume after a kill, faults. Real engine, real updates."""

import json
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from conftest import tiny_llama
from greenloop import rollout
from greenloop.curriculum import Experience
from greenloop.deck import Deck
from greenloop.errors import ConfigError, RunError, TrainingError
from greenloop.evaluate import Evaluation
from greenloop.held_out import HeldOut
from greenloop.learn.improve import Improver, Learning, TokenGroup
from greenloop.learn.policy import Policy
from greenloop.progress import Silent
from greenloop.recipe import Recipe, validated
from greenloop.run_folder import RunFolder, complete_checkpoints, keep_last, read_journal, write_folder
from greenloop.sandbox import Limits
from greenloop.seeding import seed_for
from greenloop.tasks import load_tasks
from greenloop.train import Places, train
from greenloop.types import Outcome, Task, Verdict

Cut = Callable[[float], list[int]]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {
            "task_id": f"tiny/{index}",
            "statement": f"Add {index}.",
            "entry_point": "f",
            "tests": [f"assert f(1) == {index + 1}", f"assert f(2) == {index + 2}"],
            "hidden_tests": [f"assert f(5) == {index + 5}"],
            "split": "train" if index < 5 else "test",
        }
        for index in range(7)
    ]
    path = tmp_path_factory.mktemp("tasks") / "tiny.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(cache_dir=tmp_path / "cache", data_dir=None)


def recipe(model: Path, tasks: Path, **changes: object) -> Recipe:
    values = {
        "model": str(model),
        "tasks": f"{tasks}:train",
        "eval_tasks": f"{tasks}:test",
        "steps": 4,
        "prompts": 2,
        "samples": 3,
        "dtype": "float32",
        "sampling": {"max_new_tokens": 12, "temperature": 1.0},
        "prompt": {"protocol": "bigcode"},
        "lora": {"rank": 4, "alpha": 8},
        "beta": 0.05,
        "evaluation": {"samples": 2},
        "checkpoint": {"every": 1, "keep": 2},
        **changes,
    }
    return validated(values, "test")


class ByChecksum:
    """A verifier for a random model, whose programs never pass: the program's checksum decides."""

    level, notice = "scripted", "nothing is run"

    def __init__(self, limits: Limits, workers: int | None, *, unsandboxed: bool) -> None:
        self.limits = limits

    def __enter__(self) -> "ByChecksum":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, task: Task, program: str | None) -> "Future[Verdict]":
        passed = zlib.crc32((program or "").encode()) % 3 == 0
        future: Future[Verdict] = Future()
        future.set_result(
            Verdict(
                outcome=Outcome.PASSED if passed else Outcome.FAILED,
                tests_passed=3 * passed,
                tests_total=3,
                hidden_passed=passed,
                hidden_total=1,
                ran=True,
                cpu_s=0,
                wall_s=0,
            )
        )
        return future


class NeverPasses(ByChecksum):
    """Every program fails."""

    def submit(self, task: Task, program: str | None) -> "Future[Verdict]":
        verdict = super().submit(task, program).result()
        future: Future[Verdict] = Future()
        future.set_result(replace(verdict, outcome=Outcome.FAILED, tests_passed=0, hidden_passed=0))
        return future


class Killed(Exception):
    """Stands for the process's end."""


class KillAt(Silent):
    """Ends the run when it reports the step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def say(self, text: str) -> None:
        if text.startswith(f"step {self.step:>3}/"):
            raise Killed


@pytest.fixture(scope="module")
def finished(
    model_folder: Path, tasks_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunFolder, Recipe]:
    chosen = recipe(model_folder, tasks_file)
    root = tmp_path_factory.mktemp("runs")
    return (
        train(chosen, root / "whole", Places(cache_dir=root / "cache", data_dir=None), Silent(), judge=ByChecksum),
        chosen,
    )


def test_a_run_leaves_every_file_that_it_promises(finished: tuple[RunFolder, Recipe]):
    folder, _ = finished
    journal = read_journal(folder.journal)
    assert [record["step"] for record in journal] == [0, 1, 2, 3]
    for record in journal:
        assert {"pass_rate", "reward", "outcomes", "tokens", "kl", "entropy", "sampler_trainer_gap"} <= set(record)
        assert record["seconds"]["total"] >= record["seconds"]["rollout"] > 0
        assert sum(record["outcomes"].values()) == 6
        assert record["sampler_trainer_gap"] < 1e-4
        assert record["optimizer_steps"] == 1
        assert record["kl"] is not None
    rows = pq.read_table(folder.root / "rollouts" / "step-00002.parquet").to_pylist()
    assert len(rows) == 6
    assert {"prompt", "completion", "outcome", "reward", "advantage"} <= set(rows[0])
    assert [path.name for path in sorted(folder.checkpoints.iterdir())] == ["step-00003", "step-00004"]
    results = json.loads(folder.results.read_text())
    assert {"before", "after", "difference"} <= set(results)
    environment = json.loads(folder.environment.read_text())
    assert environment["tasks"]["sha256"] != environment["eval_tasks"]["sha256"]
    assert (folder.adapter / "README.md").read_text().startswith("---\n")


def test_the_adapter_loads_in_peft_and_changes_the_logits(finished: tuple[RunFolder, Recipe], model_folder: Path):
    folder, _ = finished
    model = AutoPeftModelForCausalLM.from_pretrained(str(folder.adapter), dtype=torch.float32).eval()
    ids = torch.tensor([[40, 41, 42]])
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        base = tiny_llama()(input_ids=ids).logits
    assert (adapted - base).abs().max() > 1e-4


@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_run_resumes_to_the_same_adapter_bit_for_bit(
    finished: tuple[RunFolder, Recipe], tmp_path: Path, places: Places, step: int
):
    whole, chosen = finished
    with pytest.raises(Killed):
        train(chosen, tmp_path / "run", places, KillAt(step), judge=ByChecksum)
    resumed = train(chosen, tmp_path / "run", places, Silent(), resume=True, judge=ByChecksum)
    expected = load_file(whole.adapter / "adapter_model.safetensors")
    actual = load_file(resumed.adapter / "adapter_model.safetensors")
    assert_equal(actual, expected)
    kept = [
        {k: v for k, v in record.items() if k not in ("seconds", "tokens_per_s")}
        for record in read_journal(resumed.journal)
    ]
    wanted = [
        {k: v for k, v in record.items() if k not in ("seconds", "tokens_per_s")}
        for record in read_journal(whole.journal)
    ]
    assert kept == wanted


@pytest.fixture(scope="module")
def undivided(model_folder: Path, tasks_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two steps of four groups, each step as a whole."""
    root = tmp_path_factory.mktemp("undivided")
    chosen = recipe(model_folder, tasks_file, prompts=4, steps=2)
    return train(chosen, root / "run", Places(cache_dir=root / "cache", data_dir=None), Silent(), judge=ByChecksum)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch, undivided: RunFolder) -> Cut:
    """From its call on the sampler has room for one group of so many new tokens, as long as the prompts of `undivided`
    are. Returns the groups of each part that is learned from, as runs go on."""
    first = read_journal(undivided.journal)[0]
    add = Improver.add

    def at(new_tokens: float) -> list[int]:
        sizes: list[int] = []

        def spied(self: Improver, learning: Learning, groups: list[TokenGroup], *rest: object) -> None:
            sizes.append(len(groups))
            add(self, learning, groups, *rest)

        tokens = 1.1 * (first["prompt_tokens"] / len(first["tasks"]) + new_tokens) + 1e-6
        monkeypatch.setattr(Improver, "add", spied)
        monkeypatch.setattr(Policy, "room", property(lambda policy: tokens))
        monkeypatch.setattr(rollout, "_WORTH_A_STEP", 1)
        return sizes

    return at


def test_a_step_in_parts_samples_and_learns_the_same(
    model_folder: Path, tasks_file: Path, tmp_path: Path, places: Places, undivided: RunFolder, cut: Cut
):
    chosen = recipe(model_folder, tasks_file, prompts=4, steps=2)
    sizes = cut(36)
    parts = train(chosen, tmp_path / "parts", places, Silent(), judge=ByChecksum)
    assert sizes == [1] * 8
    for one, other in zip(read_journal(undivided.journal), read_journal(parts.journal), strict=True):
        assert one["task_outcomes"] == other["task_outcomes"]
        assert one["tokens"] == other["tokens"]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    for step in range(2):
        tables = [pq.read_table(run.root / "rollouts" / f"step-{step:05d}.parquet") for run in (undivided, parts)]
        assert tables[0]["completion"] == tables[1]["completion"]
        assert tables[0]["advantage"].to_pylist() == pytest.approx(tables[1]["advantage"].to_pylist(), abs=1e-4)
    first, second = (load_file(run.adapter / "adapter_model.safetensors") for run in (undivided, parts))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-5, rtol=0)


def test_a_killed_run_goes_on_in_the_same_parts(
    model_folder: Path, tasks_file: Path, tmp_path: Path, places: Places, cut: Cut
):
    chosen = recipe(model_folder, tasks_file, prompts=4)
    sizes = cut(35.5)
    whole = train(chosen, tmp_path / "whole", places, Silent(), judge=ByChecksum)
    # Completions of full length, as they are expected in the first step and were in the third, would have no room.
    assert sizes == [4] + [1] * 8 + [4]
    with pytest.raises(Killed):
        train(chosen, tmp_path / "run", places, KillAt(2), judge=ByChecksum)
    sizes.clear()
    resumed = train(chosen, tmp_path / "run", places, Silent(), resume=True, judge=ByChecksum)
    assert sizes == [1] * 4 + [4]
    expected, actual = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("rloo", [{"refill": 2}, {"normalize_advantages": True}])
def test_what_needs_the_whole_step_is_not_cut(
    model_folder: Path, tasks_file: Path, tmp_path: Path, places: Places, cut: Cut, rloo: dict[str, object]
):
    chosen = recipe(model_folder, tasks_file, prompts=4, steps=1, rloo=rloo)
    sizes = cut(36)
    train(chosen, tmp_path / "run", places, Silent(), judge=ByChecksum)
    assert sizes == [4]


def test_a_run_never_overwrites_another(finished: tuple[RunFolder, Recipe], places: Places):
    folder, chosen = finished
    with pytest.raises(RunError, match=r"holds a run already; continue it with --resume, or give another --out"):
        train(chosen, folder.root, places, Silent())


def test_resume_without_a_run_says_so(model_folder: Path, tasks_file: Path, tmp_path: Path, places: Places):
    with pytest.raises(RunError, match="there is no checkpoint to resume from"):
        train(recipe(model_folder, tasks_file), tmp_path / "none", places, Silent(), resume=True)


def test_training_on_the_held_out_tasks_is_refused(
    model_folder: Path, tasks_file: Path, tmp_path: Path, places: Places
):
    leaking = recipe(model_folder, tasks_file, eval_tasks=str(tasks_file))
    with pytest.raises(ConfigError, match=r"eval_tasks: .*shares 5 tasks"):
        train(leaking, tmp_path / "run", places, Silent())
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_with_the_step_and_a_saved_state(
    model_folder: Path, tasks_file: Path, tmp_path: Path, places: Places
):
    wild = recipe(
        model_folder, tasks_file, optimizer={"learning_rate": 0.9, "max_grad_norm": 1e9, "warmup_steps": 0},
        reward={"passed": 1e38}, eval_tasks="", steps=8,
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"step \d: the (loss|gradient norm) is .*no step was taken.*start again"):
        train(wild, tmp_path / "run", places, Silent(), judge=ByChecksum)
    assert RunFolder(tmp_path / "run").newest_checkpoint() is not None


def test_validation_keeps_the_best_adapter_and_stops_early(
    model_folder: Path, tasks_file: Path, tmp_path: Path, places: Places
):
    watched = recipe(
        model_folder, tasks_file, eval_tasks="", steps=6,
        evaluation={"validation_tasks": f"{tasks_file}:test", "every": 1, "patience": 2},
    )  # fmt: skip
    folder = train(watched, tmp_path / "run", places, Silent(), judge=NeverPasses)
    journal = read_journal(folder.journal)
    # Nothing is ever solved: the first score is the best, two later ones are not better.
    assert [record["validation_pass_rate"] for record in journal] == [0.0, 0.0, 0.0]
    assert (folder.best_adapter / "adapter_model.safetensors").is_file()


def test_what_is_saved_and_scored_lies_between_base_and_trained_model(
    finished: tuple[RunFolder, Recipe], model_folder: Path, tasks_file: Path, tmp_path: Path, places: Places,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    whole, _ = finished
    scored: list[torch.Tensor] = []
    examine = HeldOut._evaluate

    def spied(exam: HeldOut, *given: object) -> Evaluation:
        scored.append(exam.engine.decoder.layers[0].qkv.up.clone())
        return examine(exam, *given)

    monkeypatch.setattr(HeldOut, "_evaluate", spied)
    chosen = recipe(
        model_folder, tasks_file, lora={"rank": 4, "alpha": 8, "interpolation": 0.5},
        evaluation={"samples": 2, "validation_tasks": f"{tasks_file}:test", "every": 2},
    )  # fmt: skip
    folder = train(chosen, tmp_path / "run", places, Silent(), judge=ByChecksum)
    # It trains as without: checkpoints are of the whole adapter, the adapter has half of its B.
    trained = load_file(whole.checkpoints / "step-00004" / "adapter.safetensors")
    assert_equal(load_file(folder.checkpoints / "step-00004" / "adapter.safetensors"), trained)
    saved = load_file(folder.adapter / "adapter_model.safetensors")
    assert_equal(saved, halved(whole))
    # Before training, at two validations, and after it.
    _, *validated_with, after = scored
    assert torch.equal(after, scaled_ups(saved))
    best = scaled_ups(load_file(folder.best_adapter / "adapter_model.safetensors"))
    assert [torch.equal(one, best) for one in validated_with].count(True) == 1


def test_a_finished_run_keeps_another_share_of_its_adapter_when_it_is_resumed_so(
    finished: tuple[RunFolder, Recipe], tmp_path: Path, places: Places
):
    whole, chosen = finished
    shutil.copytree(whole.root, tmp_path / "run")
    copied = RunFolder(tmp_path / "run")
    shutil.rmtree(copied.adapter)
    shutil.rmtree(copied.evaluation("after"))
    folder = train(keeping_half(chosen), copied.root, places, Silent(), resume=True, judge=ByChecksum)
    assert_equal(load_file(folder.adapter / "adapter_model.safetensors"), halved(whole))
    assert "0.5 of what was trained is kept" in (folder.adapter / "README.md").read_text()
    # Two tasks' answers may pass as they did before, so that they are scored again is all that shows.
    assert (folder.evaluation("after") / "results.json").is_file()


def test_a_killed_run_that_keeps_a_share_goes_on_with_the_whole_adapter(
    finished: tuple[RunFolder, Recipe], tmp_path: Path, places: Places
):
    whole, chosen = finished
    half = keeping_half(chosen)
    with pytest.raises(Killed):
        train(half, tmp_path / "run", places, KillAt(3), judge=ByChecksum)
    resumed = train(half, tmp_path / "run", places, Silent(), resume=True, judge=ByChecksum)
    assert_equal(load_file(resumed.adapter / "adapter_model.safetensors"), halved(whole))


def keeping_half(chosen: Recipe) -> Recipe:
    """The recipe, but half of every B is kept."""
    return chosen.model_copy(update={"lora": chosen.lora.model_copy(update={"interpolation": 0.5})})


def halved(run: RunFolder) -> dict[str, torch.Tensor]:
    """A run's adapter with half of every B."""
    adapter = load_file(run.adapter / "adapter_model.safetensors")
    return {name: one * 0.5 if "lora_B" in name else one for name, one in adapter.items()}


def scaled_ups(adapter: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the first layer's queries, keys and values get of an adapter: B times alpha / rank, which is 2."""
    name = "base_model.model.model.layers.0.self_attn.{}_proj.lora_B.weight"
    return 2 * torch.block_diag(*(adapter[name.format(one)] for one in "qkv"))


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same tensors, bit for bit."""
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], one) for name, one in expected.items())


def test_a_torn_journal_line_is_dropped(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"ste')
    assert read_journal(path) == [{"step": 0}, {"step": 1}]
    folder = RunFolder(tmp_path)
    folder.truncate_journal(1)
    assert path.read_text() == '{"step": 0}\n'
    path.write_text('{"ste\n{"step": 1}\n')
    with pytest.raises(RunError, match=r"journal\.jsonl:1: not a JSON object"):
        read_journal(path)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path):
    def fails(into: Path) -> None:
        (into / "half").write_text("x")
        raise OSError

    target = tmp_path / "step-00001"
    write_folder(target, lambda into: (into / "whole").write_text("1") and None)
    with pytest.raises(OSError):  # noqa: PT011
        write_folder(target, fails)
    assert [path.name for path in target.iterdir()] == ["whole"]
    for step in (2, 3):
        write_folder(tmp_path / f"step-0000{step}", lambda into: None)
    keep_last(tmp_path, 2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00002", "step-00003"]


def test_what_a_killed_save_left_is_no_checkpoint(tmp_path: Path):
    folder = RunFolder(tmp_path)
    for name in ("step-00001", "step-00002.partial", "step-00001.old"):
        (folder.checkpoints / name).mkdir(parents=True)
    assert folder.newest_checkpoint() == folder.checkpoints / "step-00001"
    keep_last(folder.checkpoints, 1)
    assert (folder.checkpoints / "step-00001").is_dir()


@pytest.mark.parametrize("refill", [0, 2])
def test_refill_replaces_dead_groups_and_the_journal_counts_what_was_drawn(
    model_folder: Path, tasks_file: Path, tmp_path: Path, places: Places, refill: int
):
    chosen = recipe(model_folder, tasks_file, eval_tasks="", beta=0.0, steps=8, rloo={"refill": refill})
    folder = train(chosen, tmp_path / "run", places, Silent(), judge=ByChecksum)
    journal = read_journal(folder.journal)
    dead = sum(record["dead_groups"] for record in journal)
    assert dead > 0
    assert all(sum(record["outcomes"].values()) == 6 + 3 * min(refill, record["dead_groups"]) for record in journal)
    assert (sum(record["refilled"] for record in journal) > 0) == (refill > 0)


def test_a_resumed_run_keeps_its_recipe(finished: tuple[RunFolder, Recipe], places: Places):
    folder, chosen = finished
    other = chosen.model_copy(update={"beta": 0.5})
    with pytest.raises(ConfigError, match=r"^beta: differs from .*recipe\.toml"):
        train(other, folder.root, places, Silent(), resume=True)


def test_a_run_is_not_resumed_on_other_data(model_folder: Path, tasks_file: Path, tmp_path: Path, places: Places):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(tasks_file.read_text())
    chosen = recipe(model_folder, tasks)
    with pytest.raises(Killed):
        train(chosen, tmp_path / "run", places, KillAt(1), judge=ByChecksum)
    tasks.write_text(tasks_file.read_text().replace("Add 0.", "Add nothing."))
    with pytest.raises(ConfigError, match=r"^tasks: .*tasks.jsonl:train is not what this run began with"):
        train(chosen, tmp_path / "run", places, Silent(), resume=True, judge=ByChecksum)


def test_dropout_is_resumed_bit_for_bit_too(model_folder: Path, tasks_file: Path, tmp_path: Path, places: Places):
    chosen = recipe(model_folder, tasks_file, eval_tasks="", steps=3, lora={"rank": 4, "alpha": 8, "dropout": 0.3})
    whole = train(chosen, tmp_path / "whole", places, Silent(), judge=ByChecksum)
    with pytest.raises(Killed):
        train(chosen, tmp_path / "run", places, KillAt(2), judge=ByChecksum)
    resumed = train(chosen, tmp_path / "run", places, Silent(), resume=True, judge=ByChecksum)
    drawn = [[record["tasks"] for record in read_journal(run.journal)] for run in (whole, resumed)]
    assert drawn[0] == drawn[1]
    expected, actual = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_a_probe_asks_every_task_and_then_steers_the_draw(
    model_folder: Path, tasks_file: Path, tmp_path: Path, places: Places
):
    chosen = recipe(model_folder, tasks_file, eval_tasks="", steps=6, beta=0.0, curriculum={"probe": 3, "focus": 2})
    folder = train(chosen, tmp_path / "run", places, Silent(), judge=ByChecksum)
    probe = json.loads(folder.probe.read_text())
    assert {task_id: sum(counts) for task_id, counts in probe.items()} == {f"tiny/{i}": 3 for i in range(5)}
    experience = Experience.of_probe(probe)
    for record in read_journal(folder.journal):
        wanted = Deck(load_tasks(chosen.tasks).tasks, seed_for(chosen.seed, "deck"))
        favoured = wanted.favour(
            record["step"], chosen.prompts, experience.weights(chosen.samples, chosen.curriculum.focus)
        )
        assert record["tasks"] == [task.task_id for task in favoured]
        assert all(sum(counts) == chosen.samples for counts in record["task_outcomes"].values())
        experience = experience.after(record["task_outcomes"])


def test_more_prompts_than_tasks_cannot_be_favoured(
    model_folder: Path, tasks_file: Path, tmp_path: Path, places: Places
):
    chosen = recipe(model_folder, tasks_file, prompts=6, curriculum={"probe": 1})
    with pytest.raises(ConfigError, match=r"^prompts: 6 a step, but .* has only 5 tasks"):
        train(chosen, tmp_path / "run", places, Silent())


def test_a_run_out_of_time_ends_whole_and_goes_on_with_more(
    model_folder: Path, tasks_file: Path, tmp_path: Path, places: Places
):
    chosen = recipe(model_folder, tasks_file, max_minutes=1e-6)
    folder = train(chosen, tmp_path / "run", places, Silent(), judge=ByChecksum)
    assert len(read_journal(folder.journal)) == 1
    assert folder.results.is_file()
    train(chosen, tmp_path / "run", places, Silent(), resume=True, judge=ByChecksum)
    assert len(read_journal(folder.journal)) == 1
    patient = chosen.model_copy(update={"max_minutes": 60.0})
    train(patient, tmp_path / "run", places, Silent(), resume=True, judge=ByChecksum)
    assert len(read_journal(folder.journal)) == chosen.steps


def test_the_real_judge_sits_at_the_end_of_the_line(
    model_folder: Path, tasks_file: Path, tmp_path: Path, places: Places
):
    folder = train(recipe(model_folder, tasks_file, steps=1, eval_tasks=""), tmp_path / "run", places, Silent())
    (record,) = read_journal(folder.journal)
    assert record["pass_rate"] == 0
    assert set(record["outcomes"]) <= {"error", "failed"}
    assert record["sandbox_level"] in ("full", "no-open")
