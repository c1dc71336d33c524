"""The command as a user types it: exit status, one sentence, no traceback, no torch where it is not needed."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("GREENLOOP_", "COV"))}


def greenloop(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "greenloop", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**ENVIRONMENT, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", **extra},
        check=False,
    )


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "samples.jsonl"
    rows = [
        {"task_id": "starter/numbers/absolute_value", "solution": "def absolute_value(n):\n    return abs(n)\n"},
        {"task_id": "starter/numbers/absolute_value", "completion": "```py\ndef absolute_value(n):\n    return n\n```"},
        {"task_id": "starter/numbers/absolute_value", "completion": "I do not know."},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_score_gives_one_verdict_a_line(samples: Path, tmp_path: Path):
    out = tmp_path / "verdicts.jsonl"
    result = greenloop("score", "--tasks", "starter:test", "--samples", str(samples), "--out", str(out))
    assert result.returncode == 0, result.stderr
    verdicts = [json.loads(line) for line in out.read_text().splitlines()]
    assert [verdict["outcome"] for verdict in verdicts] == ["passed", "failed", "no_code"]
    wanted = {"task_id", "outcome", "tests_passed", "tests_total", "hidden_passed", "hidden_total", "cpu_s", "wall_s"}
    assert wanted | {"detail"} == set(verdicts[0])


def test_help_and_score_import_no_torch(samples: Path):
    watch = (
        "import sys\nfrom greenloop.cli import app\n"
        "try:\n    app({arguments!r})\nexcept SystemExit: pass\n"
        "assert not {{'torch', 'transformers', 'peft'}} & set(sys.modules), 'heavy import'\n"
    )
    for arguments in (["--help"], ["score", "--tasks", "starter", "--samples", str(samples)]):
        code = watch.format(arguments=arguments)
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "nothing"], "nothing: no recipe of this name; shipped are"),
        (["train", "--set", "samplin.top_p=1"], "samplin: unknown key"),
        (["train", "--set", "model=./no/such/model"], "./no/such/model: there is no such model"),
        (["eval", "smollm2-135m", "--tasks", "starter:dev"], "starter"),
        (["eval", "smollm2-135m", "--protocol", "chatty"], "there is no protocol 'chatty'"),
        (["eval", "smollm2-135m", "--samples", "2", "--k", "1,x"], "--k: '1,x' is not a list of numbers"),
        (["score", "--tasks", "starter", "--samples", "missing.jsonl"], "missing.jsonl"),
        (["tasks", "show", "starter", "nine"], "starter: there is no task 'nine'"),
        (["generate", "smollm2-135m", "  "], "generate: the task is empty"),
        (["compare", "a", "b"], "a"),
        (["models", "pull", "gpt"], "gpt"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_status_2(arguments: list[str], sentence: str):
    result = greenloop(*arguments)
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line]
    assert lines[-1].startswith("greenloop: ")
    assert sentence in lines[-1]
    assert "Traceback" not in result.stderr


def test_tasks_show_prints_the_whole_task():
    result = greenloop("tasks", "show", "starter", "absolute_value")
    assert result.returncode == 0
    for part in ("starter/numbers/absolute_value", "# shown tests", "# hidden tests", "# reference", "# wrong"):
        assert part in result.stdout


def test_recipes_are_listed_shown_and_explained():
    assert "starter" in greenloop("recipes", "list").stdout.split()
    assert "max_new_tokens" in greenloop("recipes", "show", "starter").stdout
    assert "sampling.temperature = 0.8: " in greenloop("recipes", "keys").stdout


WITHOUT_SECCOMP = """
import os, struct, sys
from greenloop.sandbox.inside import locks
# prctl with PR_SET_SECCOMP is refused as by a kernel without it (EINVAL); anything else is allowed.
program = [(0x20, 0, 0, 0), (0x15, 0, 3, 157), (0x20, 0, 0, 16), (0x15, 0, 1, 22)]
program += [(6, 0, 0, 0x50016), (6, 0, 0, 0x7FFF0000)]
locks._prctl(locks.PR_SET_NO_NEW_PRIVS, 1)
locks.CallFilter(b"".join(struct.pack("=HBBI", *instruction) for instruction in program)).install()
os.execv(sys.executable, [sys.executable, "-m", "greenloop", *sys.argv[1:]])
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter names system calls of x86-64")
def test_without_seccomp_nothing_runs_unless_both_settings_ask_for_it(tmp_path: Path):
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps({"task_id": "absolute_value", "solution": "absolute_value = abs"}))
    score = ("score", "--tasks", "starter", "--samples", str(samples))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WITHOUT_SECCOMP, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    for arguments in (("doctor",), score):
        refused = run(*arguments)
        assert refused.returncode == 1, refused
        assert "the kernel refuses a lock" in refused.stderr
        assert "prctl 22" in refused.stderr
        assert "rlimits-only" in refused.stderr
        assert "Traceback" not in refused.stderr
    assert run(*score, "--sandbox", "rlimits-only").returncode == 2
    allowed = run(*score, "--sandbox", "rlimits-only", "--allow-unsandboxed")
    assert allowed.returncode == 0, allowed
    assert "UNSANDBOXED" in allowed.stdout + allowed.stderr
    assert '"outcome": "passed"' in allowed.stdout


def test_doctor_names_the_level_and_proves_it():
    result = greenloop("doctor")
    assert result.returncode == 0, result.stderr
    assert "level      full, proven" in result.stdout or "level      no-open, proven" in result.stdout


def test_an_evaluation_never_overwrites_another(tmp_path: Path):
    (tmp_path / "results.json").write_text("{}")
    result = greenloop("eval", "smollm2-135m", "--out", str(tmp_path))
    assert result.returncode == 2
    assert (
        result.stderr
        == f"greenloop: --out: {tmp_path} holds the results of an evaluation already; give another folder\n"
    )
    assert (tmp_path / "results.json").read_text() == "{}"


def test_programs_run_without_locks_only_if_both_options_say_so(samples: Path):
    score = ("score", "--tasks", "starter:test", "--samples", str(samples))
    for options in (["--sandbox", "rlimits-only"], ["--allow-unsandboxed"], ["--sandbox", "none"]):
        result = greenloop(*score, *options)
        assert result.returncode == 2
        assert result.stderr.startswith("greenloop: --sandbox")
    result = greenloop(*score, "--sandbox", "rlimits-only", "--allow-unsandboxed")
    assert result.returncode == 0
    assert "UNSANDBOXED" in result.stderr
