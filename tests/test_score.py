"""Judging ready-made completions: ids, programs, verdict lines and what is said about bad files."""

import json
from pathlib import Path

import pytest

from greenloop.errors import RunError
from greenloop.sandbox import Limits
from greenloop.score import Scores, program_of, read_samples, score, verdict_line
from greenloop.tasks import load_tasks
from greenloop.types import Outcome, Task, TaskSet, Verdict

SUCCESSOR = Task(
    task_id="mbpp/11",
    statement="Write f, the successor.",
    entry_point="f",
    tests=("assert f(1) == 2", "assert f(41) == 42"),
    hidden_tests=("assert f(-1) == 0",),
)
TRIPLE = Task(
    task_id="HumanEval/3",
    statement='import math\n\n\ndef triple(x):\n    """Three times x."""\n',
    prelude="import math",
    entry_point="triple",
    tests=("def check(g):\n    assert g(2) == 6\n    assert g(math.inf) == math.inf\n\ncheck(triple)",),
)
RIGHT = "def f(x):\n    return x + 1\n"


def set_of(*tasks: Task) -> TaskSet:
    return TaskSet(spec="some:test", name="some", tasks=tasks, sha256="", source="")


BOTH = set_of(SUCCESSOR, TRIPLE)


def samples_file(folder: Path, *rows: object) -> Path:
    path = folder / "samples.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_every_sample_gets_its_verdict_line_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = samples_file(
        tmp_path,
        {"task_id": "mbpp/11", "solution": "import time\ntime.sleep(0.3)\n" + RIGHT},
        {"task_id": "mbpp/11", "completion": f"Here:\n```python\n{RIGHT}```\nDone."},
        {"task_id": "mbpp/11", "completion": "I cannot do that.", "sample": 7},
        "",
        {"task_id": "HumanEval/3", "completion": "    return 3 * x\n"},
        {"task_id": "mbpp/11", "solution": "def f(x): return 2"},
    )
    out = tmp_path / "verdicts.jsonl"
    scores = score(BOTH, path, out, limits=Limits(wall_s=5), workers=2)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines == [json.loads(line) for line in scores.lines]
    told = [(line["task_id"], line["outcome"], line["tests_passed"], line["hidden_passed"]) for line in lines]
    assert told == [
        ("mbpp/11", "passed", 3, 1),
        ("mbpp/11", "passed", 3, 1),
        ("mbpp/11", "no_code", 0, 0),
        ("HumanEval/3", "passed", 1, 0),
        ("mbpp/11", "failed", 1, 0),
    ]
    assert scores.outcomes == {"passed": 3, "failed": 1, "no_code": 1}
    assert scores.all_judged
    assert sorted(file.name for file in tmp_path.iterdir()) == ["samples.jsonl", "verdicts.jsonl"]


def test_a_verdict_line_has_exactly_the_promised_fields() -> None:
    verdict = Verdict(
        outcome=Outcome.ERROR,
        tests_passed=2,
        tests_total=5,
        hidden_passed=1,
        hidden_total=3,
        ran=True,
        cpu_s=0.123456,
        wall_s=1.5,
        detail="test 3: KeyError",
    )
    assert verdict_line("mbpp/11", verdict) == (
        '{"task_id": "mbpp/11", "outcome": "error", "tests_passed": 2, "tests_total": 5, "hidden_passed": 1, '
        '"hidden_total": 3, "cpu_s": 0.1235, "wall_s": 1.5, "detail": "test 3: KeyError"}'
    )
    harness = Verdict(
        outcome=Outcome.HARNESS,
        tests_passed=0,
        tests_total=1,
        hidden_passed=0,
        hidden_total=0,
        ran=False,
        cpu_s=0.0,
        wall_s=0.0,
    )
    assert Scores(task_ids=("a",), verdicts=(verdict,)).all_judged
    assert not Scores(task_ids=("a", "b"), verdicts=(verdict, harness)).all_judged


def test_a_solution_is_used_as_it_is_and_wins_over_a_completion(tmp_path: Path) -> None:
    solution = "```python\nnot extracted\n```"
    path = samples_file(tmp_path, {"task_id": "mbpp/11", "completion": RIGHT, "solution": solution})
    assert read_samples(BOTH, path)[0].program == solution


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("    return 3 * x\n", TRIPLE.statement + "    return 3 * x\n"),
        ("    def g(y):\n        return y\n    return g(x)\n\n\ndef other():\n    pass\n", None),
        ("```python\n    return 3 * x\n```", TRIPLE.statement + "    return 3 * x\n"),
        ("```python\ndef triple(x):\n    return x\n```", "def triple(x):\n    return x\n"),
        ("def triple(x):\n    return x\n", "def triple(x):\n    return x\n"),
        ("triple = lambda x: 3 * x\n", "triple = lambda x: 3 * x\n"),
    ],
)
def test_a_body_continues_a_humaneval_statement_and_a_whole_function_replaces_it(
    completion: str, program: str | None
) -> None:
    assert program_of(TRIPLE, completion) == (program or TRIPLE.statement + completion)


def test_the_published_humaneval_bodies_pass_as_completions(data_dir: Path, tmp_path: Path) -> None:
    tasks = load_tasks("humaneval", data_dir=data_dir)
    bodies = {task.task_id: task.reference.removeprefix(task.statement) for task in tasks.tasks}
    path = samples_file(tmp_path, *({"task_id": name, "completion": body} for name, body in bodies.items()))
    scores = score(tasks, path)
    assert scores.outcomes == {"passed": 164}, [verdict.detail for verdict in scores.verdicts if verdict.detail]


def test_an_empty_completion_is_no_program() -> None:
    assert program_of(TRIPLE, " \n") is None
    assert program_of(SUCCESSOR, " \n") is None
    assert program_of(SUCCESSOR, "    return x + 1\n") is None


@pytest.mark.parametrize("task_id", ["mbpp/11", "Mbpp/11", "MBPP/11", "11", 11])
def test_a_task_is_found_by_its_id_without_regard_to_case_or_by_the_last_part(
    tmp_path: Path, task_id: str | int
) -> None:
    path = samples_file(tmp_path, {"task_id": task_id, "solution": RIGHT})
    assert read_samples(BOTH, path)[0].task is SUCCESSOR


def test_an_exact_id_wins_over_a_lenient_match(tmp_path: Path) -> None:
    plain = Task(task_id="11", statement="", entry_point="f", tests=("f()",))
    path = samples_file(tmp_path, {"task_id": "11", "solution": ""}, {"task_id": "MBPP/11", "solution": ""})
    assert [sample.task for sample in read_samples(set_of(SUCCESSOR, plain), path)] == [plain, SUCCESSOR]


GOOD = {"task_id": "mbpp/11", "solution": ""}
BAD_LINES = {
    "not JSON": ("{oops", "line 2: not a JSON object"),
    "not an object": ("[1]", "line 2: not a JSON object"),
    "no id": ({"solution": ""}, 'line 2: the field "task_id" is missing'),
    "an id of a wrong type": ({"task_id": None, "solution": ""}, 'line 2: "task_id" must be a text or a whole number'),
    "a boolean id": ({"task_id": True, "solution": ""}, 'line 2: "task_id" must be a text or a whole number'),
    "an unknown id": ({"task_id": "mbpp/12", "solution": ""}, "line 2: \"task_id\" 'mbpp/12' is not in some:test"),
    "another set's id": ({"task_id": "other/11", "solution": ""}, "'other/11' is not in some:test"),
    "no program": ({"task_id": "11"}, 'line 2: neither "completion" nor "solution"'),
    "a program of a wrong type": ({"task_id": "11", "completion": ["x"]}, 'line 2: "completion" must be a text'),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path: Path, line: object, message: str) -> None:
    path = samples_file(tmp_path, GOOD, line)
    with pytest.raises(RunError) as caught:
        score(BOTH, path, tmp_path / "out.jsonl")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_an_ambiguous_id_is_refused(tmp_path: Path) -> None:
    twin = Task(task_id="other/11", statement="", entry_point="f", tests=("f()",))
    with pytest.raises(RunError, match="could be mbpp/11 or other/11"):
        read_samples(set_of(SUCCESSOR, twin), samples_file(tmp_path, {"task_id": "11", "solution": ""}))


def test_a_samples_file_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"none\.jsonl cannot be read: No such file"):
        score(BOTH, tmp_path / "none.jsonl")
    with pytest.raises(RunError, match="holds no samples"):
        score(BOTH, samples_file(tmp_path, "", " "))
    (tmp_path / "samples.jsonl").write_bytes(b'{"task_id": "\xff"}')
    with pytest.raises(RunError, match="not UTF-8"):
        score(BOTH, tmp_path / "samples.jsonl")


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_judged(tmp_path: Path) -> None:
    path = samples_file(tmp_path, {"task_id": "nobody", "solution": ""})
    with pytest.raises(RunError, match="cannot be written: name a file in a folder that exists"):
        score(BOTH, path, tmp_path / "missing" / "out.jsonl")
    with pytest.raises(RunError, match="cannot be written"):
        score(BOTH, path, tmp_path)
    with pytest.raises(RunError, match="is the samples file"):
        score(BOTH, path, path)


def test_a_byte_order_mark_and_carriage_returns_are_read(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    assert len(read_samples(BOTH, path)) == 1
