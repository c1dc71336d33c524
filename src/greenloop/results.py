"""An evaluation as files, and back.

In: an `Evaluation` and what is known of the model and the machine. Out: `results.json` and the samples files in a
folder (docs/results-format.md), and lines for people; later the record of a `results.json`. Each file appears whole or
not at all; `results.json` comes last, so that a folder that has one is complete. Computes no estimate.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from greenloop.errors import RunError
from greenloop.evaluate import Evaluation
from greenloop.exports import EVALPLUS_SETS, HUMAN_EVAL_SETS, evalplus_line, human_eval_line
from greenloop.files import write_atomically
from greenloop.statistics import Estimate
from greenloop.summary import Answer, Mode, Summary

Record = dict[str, Any]
"""A JSON object."""

FORMAT = "greenloop-results-1"
RESULTS = "results.json"
SAMPLES = "samples.jsonl"
EVALPLUS = "samples-evalplus.jsonl"
HUMAN_EVAL = "samples-human-eval.jsonl"
_SAMPLED = "-sampled.jsonl"

_ABOUT_TASKS = ("tasks", "eval_tasks", "model", "seed")
"""Keys of an environment that are not about the machine, or that an evaluation states itself."""


def write_evaluation(folder: Path, evaluation: Evaluation, environment: Mapping[str, Any]) -> Path:
    """Write `results.json` and the samples files into `folder`, making it if needed; the path of `results.json`.

    Files of an earlier evaluation in the same folder are replaced, or removed where this one has no such file.

    Args:
        folder: where to.
        evaluation: what was measured.
        environment: what a run's `environment.json` holds: `model` and what is known of machine and versions.

    Raises:
        RunError: the folder or a file cannot be written.
    """
    files = sample_files(evaluation)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (RESULTS, *_sample_names()):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror or error}; name another folder") from error
    for name, lines in files.items():
        write_atomically(folder / name, "".join(f"{line}\n" for line in lines))
    path = folder / RESULTS
    write_atomically(path, json_text(evaluation_record(evaluation, environment)))
    return path


def evaluation_record(evaluation: Evaluation, environment: Mapping[str, Any]) -> Record:
    """The JSON object that describes an evaluation; a run's `results.json` holds one as `before` and one as `after`."""
    tasks, settings = evaluation.task_set, evaluation.settings
    return {
        "format": FORMAT,
        "model": dict(environment.get("model", {})),
        "tasks": {
            "spec": tasks.spec,
            "name": tasks.name,
            "sha256": tasks.sha256,
            "source": tasks.source,
            "hub_id": tasks.hub_id,
            "licence": tasks.licence,
            "count": len(tasks.tasks),
        },
        "settings": {**asdict(settings), "k": list(settings.k)},
        "seed": evaluation.seed,
        "environment": {key: value for key, value in environment.items() if key not in _ABOUT_TASKS},
        "seconds": round(evaluation.seconds, 3),
        "greedy": _summary_record(evaluation.greedy),
        "sampled": _summary_record(evaluation.sampled),
    }


def _summary_record(summary: Summary | None) -> Record | None:
    if summary is None:
        return None
    return {
        "answers": summary.answers,
        "judged": summary.judged,
        "harness": summary.harness,
        "pass_at_k": {str(one.k): {**asdict(one.estimate), "tasks": one.tasks} for one in summary.pass_at_k},
        "outcomes": summary.outcomes,
        "ran": asdict(summary.ran),
        "passed_of_ran": _estimate_record(summary.passed_of_ran),
        "shown_hidden_gap": _estimate_record(summary.shown_hidden_gap),
        "truncated": summary.truncated,
        "mean_tokens": summary.mean_tokens,
        "well_formed": summary.well_formed,
        "tasks": [asdict(task) for task in summary.tasks],
    }


def _estimate_record(estimate: Estimate | None) -> Record | None:
    return None if estimate is None else asdict(estimate)


def sample_files(evaluation: Evaluation) -> dict[str, list[str]]:
    """The samples files by name, each as its lines.

    A file for another harness holds one mode, because they would take greedy answers for more samples: the greedy
    answers where there are any; the samples beside them go to a file of their own.
    """
    files = {SAMPLES: [sample_line(answer) for answer in evaluation.answers]}
    name = evaluation.task_set.name
    modes = [mode for mode in Mode if any(answer.mode is mode for answer in evaluation.answers)]
    for mode in modes:
        second = mode is Mode.SAMPLED and len(modes) > 1
        answers = [answer for answer in evaluation.answers if answer.mode is mode]
        if name in EVALPLUS_SETS:
            files[_named(EVALPLUS, second)] = [evalplus_line(answer) for answer in answers]
        if name in HUMAN_EVAL_SETS:
            files[_named(HUMAN_EVAL, second)] = [human_eval_line(answer) for answer in answers]
    return files


def _named(name: str, second: bool) -> str:
    return name.removesuffix(".jsonl") + _SAMPLED if second else name


def _sample_names() -> Iterable[str]:
    return (SAMPLES, *(_named(name, second) for name in (EVALPLUS, HUMAN_EVAL) for second in (False, True)))


def sample_line(answer: Answer) -> str:
    """One line of `samples.jsonl`; it has no `solution` where the completion holds no code."""
    verdict = answer.verdict
    solution = {} if answer.program is None else {"solution": answer.program}
    return json.dumps(
        {
            "task_id": answer.task.task_id,
            "mode": answer.mode.value,
            "sample": answer.sample,
            "completion": answer.completion.text,
            **solution,
            "outcome": verdict.outcome.value,
            "tests_passed": verdict.tests_passed,
            "tests_total": verdict.tests_total,
            "hidden_passed": verdict.hidden_passed,
            "hidden_total": verdict.hidden_total,
            "ran": verdict.ran,
            "well_formed": answer.well_formed,
            "finish": answer.completion.finish.value,
            "tokens": len(answer.completion.token_ids),
            "detail": verdict.detail,
        }
    )


def read_record(path: Path) -> Record:
    """The JSON object of a `results.json`, given itself or its folder.

    Raises:
        RunError: there is none, or it was not written by greenloop.
    """
    file = path / RESULTS if path.is_dir() else path
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(
            f"{file} cannot be read ({error.strerror or error}): give a results.json or a folder that holds one"
        ) from error
    except ValueError as error:
        raise RunError(f"{file} is not a JSON file ({error}): run the evaluation again") from error
    evaluations = evaluations_of(record) if isinstance(record, dict) else {}
    if not evaluations or any(one.get("format") != FORMAT for one in evaluations.values()):
        raise RunError(f"{file} is not a {FORMAT} file: give one that this version of greenloop wrote")
    return dict(record)


def evaluations_of(record: Record) -> dict[str, Record]:
    """The evaluations that a record holds: `before` and `after` of a run, or the one of `greenloop eval` as `""`."""
    if "before" in record or "after" in record:
        return {key: record[key] for key in ("before", "after") if isinstance(record.get(key), dict)}
    return {"": record}


def evaluation_lines(record: Record) -> list[str]:
    """An evaluation's record for people, one fact a line."""
    settings = record["settings"]
    lines = [f"{record['tasks']['spec']}: {record['tasks']['count']} tasks, protocol {settings['protocol']}"]
    for mode in Mode:
        if record[mode.value] is not None:
            how = "greedy" if mode is Mode.GREEDY else f"{settings['samples']} samples at {settings['temperature']:g}"
            lines += [f"{how}, {line}" for line in _summary_lines(record[mode.value])]
    return lines


def _summary_lines(summary: Record) -> list[str]:
    lines = [f"pass@{k}: {percent(estimate_of(one))}" for k, one in summary["pass_at_k"].items()]
    lines.append(f"programs that run: {percent(estimate_of(summary['ran']))}")
    for key, name in (("passed_of_ran", "passes among those"), ("shown_hidden_gap", "pass shown but not all tests")):
        if summary[key] is not None:
            lines.append(f"{name}: {percent(estimate_of(summary[key]))}")
    lines.append("outcomes: " + ", ".join(f"{name} {count}" for name, count in summary["outcomes"].items() if count))
    lines.append(f"truncated {100 * summary['truncated']:.1f} %, {summary['mean_tokens']:.0f} tokens an answer")
    if summary["harness"]:
        lines.append(f"{summary['harness']} of {summary['answers']} answers could not be judged and count for nothing")
    return lines


def estimate_of(record: Mapping[str, Any]) -> Estimate:
    """The estimate that a record holds."""
    return Estimate(record["value"], record["low"], record["high"])


def percent(estimate: Estimate) -> str:
    """An estimate for people.

    >>> percent(Estimate(0.25, 0.101, 0.4))
    '25.0 % [10.1, 40.0]'
    """
    return f"{100 * estimate.value:.1f} % [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def json_text(value: object) -> str:
    """JSON as it stands in our files: indented, one line end at the end, no NaN."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
