"""Loading of task sets: schema, specs, splits, content hash, the published sets and the check of references."""

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future
from importlib.resources import files
from pathlib import Path

import pytest

from greenloop.errors import TaskError
from greenloop.tasks import content_sha256, load_tasks
from greenloop.tasks.check import Problem, check_references
from greenloop.tasks.content import task_set
from greenloop.types import Outcome, Task, Verdict

GOOD = {
    "task_id": "double",
    "statement": "Write a function that doubles a number.",
    "tests": ["assert double(2) == 4", "assert double(0) == 0"],
}


def write(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(folder: Path, *rows: object) -> str:
    path = write(folder / "own.jsonl", rows)
    with pytest.raises(TaskError) as caught:
        load_tasks(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_a_minimal_line_becomes_a_train_task_whose_entry_point_is_derived(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", [GOOD])
    loaded = load_tasks(str(path))
    assert loaded.tasks == (
        Task(
            task_id="double",
            statement="Write a function that doubles a number.",
            entry_point="double",
            tests=("assert double(2) == 4", "assert double(0) == 0"),
        ),
    )
    assert loaded.tasks[0].split == "train"
    assert (loaded.spec, loaded.name, loaded.source) == (str(path), "own.jsonl", str(path))


def test_all_fields_of_the_schema_arrive_in_the_task(tmp_path: Path) -> None:
    row = {
        **GOOD,
        "entry_point": "double",
        "hidden_tests": ["assert double(-1) == -2"],
        "setup": "import math",
        "prelude": "TWO = 2",
        "reference": "def double(x):\r\n    return TWO * x\r\n",
        "wrong": ["def double(x):\n    return 4"],
        "split": "test",
        "topic": "numbers",
    }
    (task,) = load_tasks(str(write(tmp_path / "own.jsonl", [row]))).tasks
    assert task == Task(
        task_id="double",
        statement=GOOD["statement"],
        entry_point="double",
        tests=tuple(GOOD["tests"]),
        hidden_tests=("assert double(-1) == -2",),
        setup="import math",
        prelude="TWO = 2",
        reference="def double(x):\n    return TWO * x\n",
        wrong=("def double(x):\n    return 4",),
        split="test",
        topic="numbers",
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"task_id": ""}, "field task_id: expected a string that is not empty"),
        ({"task_id": 7}, "field task_id: expected a string, found a number"),
        ({"statement": None}, "field statement: expected a string, found null"),
        ({"tests": []}, "field tests: expected at least one test"),
        ({"tests": "assert double(2) == 4"}, "field tests: expected a list of strings, found a string"),
        ({"tests": ["assert double(2) == 4", 5]}, "field tests[1]: expected a string, found a number"),
        ({"tests": ["# nothing"]}, "field tests[0]: expected a block of Python that asserts, but it is empty"),
        ({"tests": ["assert double(2 == 4"]}, "field tests[0]: expected Python, but it does not parse"),
        ({"tests": ["double(2) == 4"]}, "field tests[0]: expected an assertion"),
        (
            {"tests": ["assert True"]},
            "field entry_point: expected one function that every test calls, but there is none",
        ),
        ({"tests": ["assert f(g(1))"]}, "there are 2 (f, g); name it in this field"),
        ({"entry_point": "triple"}, "field tests[0]: expected a call of 'triple'"),
        ({"entry_point": "a b"}, "field entry_point: expected the name of a function, found 'a b'"),
        ({"hidden_tests": ["assert 1"]}, "field hidden_tests[0]: expected a call of 'double'"),
        ({"setup": "import"}, "field setup: expected Python"),
        ({"reference": "def double(x) return x"}, "field reference: expected Python"),
        (
            {"entry_point": "double", "reference": "def twice(x): return x"},
            "reference: expected a definition of 'double'",
        ),
        ({"split": " "}, "field split: expected a string that is not empty"),
        ({"test": ["assert double(2) == 4"]}, "field 'test': expected one of the fields entry_point, hidden_tests,"),
    ],
)
def test_a_bad_field_is_refused_with_file_line_field_and_expectation(
    tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    message = refusal(tmp_path, {**GOOD, "task_id": "first"}, {**GOOD, **change})
    assert expected in message
    assert "own.jsonl, line 2, " in message


def test_a_missing_field_is_refused_by_name(tmp_path: Path) -> None:
    row = {name: value for name, value in GOOD.items() if name != "statement"}
    assert "line 1, field statement: expected this field, but it is missing" in refusal(tmp_path, row)


def test_a_repeated_id_is_refused_and_both_lines_are_named(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD, {**GOOD, "task_id": "other"}, GOOD)
    assert "line 3, field task_id" in message
    assert "own.jsonl, line 1 has 'double' too" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{'task_id': 1}\n", "line 1: expected one JSON object a line"),
        (b"\n\n[1]\n", "line 3: expected a JSON object, found a list"),
        (b"[" * 100_000, "line 1: expected one JSON object a line"),
        (b"\n  \n", "expected at least one task, found none"),
        (b"\xff\xfe", "expected UTF-8 text, but byte 0 is not"),
    ],
)
def test_a_file_that_is_not_json_lines_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "own.jsonl").write_bytes(content)
    with pytest.raises(TaskError, match=r"own\.jsonl") as caught:
        load_tasks(str(tmp_path / "own.jsonl"))
    assert expected in str(caught.value)


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    row = {**GOOD, "statement": "Double\u2028it."}
    (tmp_path / "own.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert load_tasks(str(tmp_path / "own.jsonl")).tasks[0].statement == "Double\u2028it."


def test_a_test_may_hand_the_entry_point_to_a_checker(tmp_path: Path) -> None:
    test = "def check(candidate):\n    assert candidate(2) == 4\ncheck(double)"
    (task,) = load_tasks(str(write(tmp_path / "own.jsonl", [{**GOOD, "tests": [test]}]))).tasks
    assert task.entry_point == "double"


def test_odd_escapes_in_code_raise_no_warning(tmp_path: Path) -> None:
    row = {**GOOD, "reference": "def double(x):\n    '\\d'\n    return 2 * x"}
    assert len(load_tasks(str(write(tmp_path / "own.jsonl", [row]))).tasks) == 1


def test_a_spec_with_a_split_gives_that_split_and_another_hash(tmp_path: Path) -> None:
    rows = [{**GOOD, "task_id": name, "split": split} for name, split in (("a", "train"), ("b", "test"), ("c", "test"))]
    path = write(tmp_path / "own.jsonl", rows)
    everything, chosen = load_tasks(str(path)), load_tasks(f"{path}:test")
    assert [task.task_id for task in everything.tasks] == ["a", "b", "c"]
    assert [task.task_id for task in chosen.tasks] == ["b", "c"]
    assert (chosen.spec, chosen.name) == (f"{path}:test", "own.jsonl")
    assert chosen.sha256 == content_sha256(everything.tasks[1:]) != everything.sha256


def test_a_split_without_tasks_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", [GOOD])
    with pytest.raises(TaskError, match=r"no tasks in split 'tset'; its splits are train \(1\)"):
        load_tasks(f"{path}:tset")


@pytest.mark.parametrize("spec", ["mbbp", "mbbp:test", "", ":test", "tasks.json"])
def test_an_unknown_set_is_refused_with_the_known_ones(spec: str) -> None:
    with pytest.raises(TaskError, match="give one of starter, mbpp, mbpp-sanitized, humaneval or the path"):
        load_tasks(spec)


def test_a_missing_file_and_a_missing_data_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"none\.jsonl: cannot be read"):
        load_tasks(str(tmp_path / "none.jsonl"))
    with pytest.raises(TaskError, match="GREENLOOP_DATA_DIR: there is no folder"):
        load_tasks("mbpp", data_dir=tmp_path / "none")


def test_the_hash_is_that_of_canonical_json_without_empty_fields() -> None:
    task = Task(task_id="a", statement="é", entry_point="f", tests=("assert f()",))
    line = b'{"entry_point":"f","split":"train","statement":"\\u00e9","task_id":"a","tests":["assert f()"]}\n'
    assert content_sha256([task]) == hashlib.sha256(line).hexdigest()
    assert content_sha256([task, task]) == hashlib.sha256(line + line).hexdigest()


def test_the_starter_set_keeps_its_promises() -> None:
    starter = load_tasks("starter")
    entry_points = Counter(task.entry_point for task in starter.tasks)
    assert entry_points.most_common(1)[0][1] == 1
    for task in starter.tasks:
        assert len(task.tests) == 3, task.task_id
        assert len(task.hidden_tests) >= 5, task.task_id
        assert task.reference, task.task_id
        assert task.wrong, task.task_id
        assert task.entry_point in task.statement, task.task_id
        assert task.task_id == f"starter/{task.topic}/{task.entry_point}"
    assert (starter.licence, starter.hub_id) == ("Apache-2.0", "")
    assert {task.split for task in load_tasks("starter:test").tasks} == {"test"}


def test_the_starter_set_equals_its_frozen_hashes() -> None:
    frozen = files("greenloop.tasks") / "starter" / "SHA256"
    if not frozen.is_file():
        pytest.skip("the starter set is not frozen yet: scripts/freeze_starter.py --write")
    for line in frozen.read_text(encoding="utf-8").splitlines():
        sha256, spec = line.split()
        assert load_tasks(spec).sha256 == sha256, spec


def test_mbpp_has_its_official_splits_and_every_entry_point_resolves(data_dir: Path) -> None:
    mbpp = load_tasks("mbpp", data_dir=data_dir)
    assert Counter(task.split for task in mbpp.tasks) == {"prompt": 10, "test": 500, "validation": 90, "train": 374}
    assert [task.task_id for task in mbpp.tasks] == [f"mbpp/{number}" for number in range(1, 975)]
    assert (mbpp.licence, mbpp.hub_id) == ("CC-BY-4.0", "google-research-datasets/mbpp")
    by_id = {task.task_id: task for task in mbpp.tasks}
    odd = {"mbpp/11": "remove_Occ", "mbpp/126": "sum", "mbpp/601": "max_chain_length", "mbpp/927": "max_height"}
    assert {task_id: by_id[task_id].entry_point for task_id in odd} == odd
    assert [task.task_id for task in mbpp.tasks if task.setup] == ["mbpp/367", "mbpp/927"]
    assert not any("\r" in text for task in mbpp.tasks for text in (task.reference, task.statement, *task.tests))
    assert not any(task.hidden_tests for task in mbpp.tasks)


def test_the_published_sets_have_the_hashes_that_runs_record(data_dir: Path) -> None:
    hashes = {spec: load_tasks(spec, data_dir=data_dir).sha256[:16] for spec in ("mbpp", "mbpp-sanitized", "humaneval")}
    assert hashes == {"mbpp": "54ea8393f080b005", "mbpp-sanitized": "b71b93ed313260ed", "humaneval": "1286e6cd9de442c3"}


def test_sanitized_mbpp_has_its_imports_as_setup(data_dir: Path) -> None:
    sanitized = load_tasks("mbpp-sanitized", data_dir=data_dir)
    assert Counter(task.split for task in sanitized.tasks) == {"prompt": 7, "test": 257, "validation": 43, "train": 120}
    assert Counter(task.setup for task in sanitized.tasks) == {"": 414, "import math": 13}


def test_humaneval_is_one_block_a_task_with_the_helpers_as_prelude(data_dir: Path) -> None:
    humaneval = load_tasks("humaneval:test", data_dir=data_dir)
    assert len(humaneval.tasks) == 164
    assert (humaneval.licence, humaneval.hub_id) == ("MIT", "openai/openai_humaneval")
    task = humaneval.tasks[32]
    assert (task.task_id, task.entry_point) == ("HumanEval/32", "find_zero")
    assert task.prelude.startswith("import math\n\n\ndef poly(xs: list, x: float):\n")
    assert "def find_zero" not in task.prelude
    assert task.statement.lstrip("\n").startswith(task.prelude)
    assert task.reference.startswith(task.statement)
    (block,) = task.tests
    assert "def check(candidate):" in block
    assert block.endswith("\n\ncheck(find_zero)\n")


def test_references_of_humaneval_pass_their_block_in_plain_python(data_dir: Path) -> None:
    for task in load_tasks("humaneval", data_dir=data_dir).tasks[:40]:
        exec("\n".join((task.prelude, task.reference, *task.tests)), {})


def test_damaged_data_files_are_refused_with_their_name(tmp_path: Path) -> None:
    (tmp_path / "mbpp.jsonl").write_text('{"task_id": 11, "text": "x"}\n', encoding="utf-8")
    (tmp_path / "sanitized-mbpp.json").write_text('{"task_id": 11}', encoding="utf-8")
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(b'{"task_id": "HumanEval/0"}\n')[:-9])
    with pytest.raises(TaskError, match=r"mbpp\.jsonl, line 1: expected a row of MBPP, but it has no column test_list"):
        load_tasks("mbpp", data_dir=tmp_path)
    with pytest.raises(TaskError, match=r"sanitized-mbpp\.json: expected a JSON list of objects"):
        load_tasks("mbpp-sanitized", data_dir=tmp_path)
    with pytest.raises(TaskError, match=r"HumanEval\.jsonl\.gz: expected gzipped UTF-8 text"):
        load_tasks("humaneval", data_dir=tmp_path)


def hub_folder(root: Path, hub_id: str, tables: dict[tuple[str, str], list[dict[str, object]]]) -> None:
    """A data set repository as it lies on the hub: Parquet files, named in the card's metadata."""
    import pyarrow
    import pyarrow.parquet

    folder = root / hub_id
    parts: dict[str, str] = {}
    for (config, split), rows in tables.items():
        whole = [row for (name, _), some in tables.items() if name == config for row in some]
        table = pyarrow.Table.from_pylist(rows, schema=pyarrow.Table.from_pylist(whole).schema)
        (folder / config).mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, folder / config / f"{split}-00000-of-00001.parquet")
        parts[config] = parts.get(config, "") + f"  - split: {split}\n    path: {config}/{split}-*\n"
    card = "".join(f"- config_name: {config}\n  data_files:\n{part}" for config, part in parts.items())
    (folder / "README.md").write_text(f"---\nconfigs:\n{card}---\n", encoding="utf-8")


def test_the_hub_gives_the_same_content_as_the_files(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    full = [json.loads(line) for line in (data_dir / "mbpp.jsonl").read_text(encoding="utf-8").splitlines()]
    sanitized = json.loads((data_dir / "sanitized-mbpp.json").read_text(encoding="utf-8"))
    ranges = {"train": (601, 974), "test": (11, 510), "validation": (511, 600), "prompt": (1, 10)}
    tables = {
        (config, split): [row for row in rows if first <= row["task_id"] <= last]
        for config, rows in (("full", full), ("sanitized", sanitized))
        for split, (first, last) in ranges.items()
    }
    hub_folder(tmp_path, "google-research-datasets/mbpp", tables)
    lines = gzip.decompress((data_dir / "HumanEval.jsonl.gz").read_bytes()).decode().splitlines()
    hub_folder(tmp_path, "openai/openai_humaneval", {("openai_humaneval", "test"): [json.loads(x) for x in lines]})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    empty = tmp_path / "empty"
    empty.mkdir()
    for spec in ("mbpp:train", "mbpp-sanitized", "humaneval"):
        assert load_tasks(spec, data_dir=empty).sha256 == load_tasks(spec, data_dir=data_dir).sha256, spec


class ScriptedVerifier:
    """Answers from a script: program -> outcomes of its successive runs."""

    level, notice = "scripted", "nothing is run"

    def __init__(self, script: dict[str, list[tuple[Outcome, int, float]]]) -> None:
        self._script = {program: list(answers) for program, answers in script.items()}

    def submit(self, task: Task, program: str | None) -> Future[Verdict]:
        outcome, shown_passed, cpu_s = self._script[program or ""].pop(0)
        verdict = Verdict(
            outcome=outcome,
            tests_passed=shown_passed,
            tests_total=3,
            hidden_passed=0,
            hidden_total=0,
            ran=True,
            cpu_s=cpu_s,
            wall_s=cpu_s,
        )
        future: Future[Verdict] = Future()
        future.set_result(verdict)
        return future


def checked(reference: str, script: dict[str, list[tuple[Outcome, int, float]]], wrong: tuple[str, ...] = ()):
    task = Task(task_id="t", statement="s", entry_point="f", tests=("assert f()",), reference=reference, wrong=wrong)
    return check_references(task_set("own", [task], source=""), ScriptedVerifier(script))


PASS, FAIL = (Outcome.PASSED, 3, 0.1), (Outcome.FAILED, 2, 0.1)


@pytest.mark.parametrize(
    ("runs", "problems", "passed"),
    [
        ([PASS, PASS], (), 1),
        ([PASS, (Outcome.PASSED, 3, 1.2)], (Problem.SLOW,), 1),
        ([FAIL, FAIL], (Problem.FAILING,), 0),
        ([PASS, FAIL], (Problem.FLAKY,), 0),
        ([FAIL, (Outcome.FAILED, 1, 0.1)], (Problem.FLAKY,), 0),
        ([(Outcome.TIMEOUT, 0, 3.0)] * 2, (Problem.FAILING, Problem.SLOW), 0),
        ([PASS, (Outcome.HARNESS, 0, 0.0)], (Problem.UNJUDGED,), 0),
    ],
)
def test_runs_of_a_reference_tell_its_problems(
    runs: list[tuple[Outcome, int, float]], problems: tuple[Problem, ...], passed: int
) -> None:
    report = checked("ref", {"ref": runs})
    assert report.checks[0].problems == problems
    assert report.passed == passed
    assert report.ok is (problems in ((), (Problem.SLOW,)))


def test_a_wrong_solution_that_passes_is_a_problem_and_one_that_fails_tells_how_near_it_came() -> None:
    report = checked("ref", {"ref": [PASS, PASS], "bad": [FAIL], "good": [PASS]}, wrong=("bad", "good"))
    (check,) = report.having(Problem.WRONG_PASSES)
    assert [verdict.shown_passed for verdict in check.wrong] == [2, 3]
    assert not report.ok
    assert checked("ref", {"ref": [PASS, PASS], "bad": [FAIL]}, wrong=("bad",)).ok


def test_a_task_without_reference_is_noted_and_not_run() -> None:
    report = checked("", {})
    assert report.checks[0].problems == (Problem.NO_REFERENCE,)
    assert (report.passed, report.ok) == (0, True)
