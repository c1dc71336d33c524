r"""The named ways of putting a task to a model, and of reading its answer.

In: a task (its `tests` are those that may be shown), a tokenizer, and for few-shot protocols three solved tasks. Out: a
`Prompt`. Knows no model and draws nothing at random; every protocol is a constant.

* `train`: chat; our own system message, always (a template may inject one of its own otherwise); all tests shown.
* `mbpp-3shot`: plain text after three solved tasks, as Austin et al. 2021; all tests shown.
* `lm-eval-instruct`: chat with three solved tasks as earlier turns and a prefilled answer, as `mbpp_instruct` of
  lm-eval; no system message passed, so the template's own default stays; all tests shown.
* `bigcode`: plain text, one docstring, as `mbpp` of bigcode-evaluation-harness; the first test shown.
* `evalplus-chat`: chat with a prefilled answer, as evalplus's `codegen`; no system message passed; first test shown.

Where we deviate from the harnesses, on purpose:

* Rendered chat text is encoded without adding special tokens again (evalplus may add a second beginning-of-sequence).
* lm-eval's filter takes the first word of an unfenced program for a language tag, so that `def f()` becomes ` f()` (its
  pull request 3769); ours takes a tag only before a line end. The few-shot turns are those of its current releases: one
  turn each, no space after the prefill.
* evalplus's extraction runs on `ast` instead of tree-sitter; bigcode's leaves out a prompt that is only a docstring.
* Solved tasks are shown as the task set gives them; MBPP here has plain line ends, in the harnesses `\r\n`.
* A task whose statement is a signature with a docstring (HumanEval) is put as that signature. A test block that defines
  `check(candidate)` is HumanEval's grader, which no harness shows: it always stays hidden.
* A task without shown tests names its function in a sentence instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

from greenloop.errors import ConfigError, ModelError
from greenloop.prompt.extract import answered, extract_code, first_fenced_block, longest_valid_span, reachable_program
from greenloop.types import Prompt, Task

Message = dict[str, str]
"""`role` and `content`, as chat templates take them."""

MBPP_SHOTS = ("mbpp/2", "mbpp/3", "mbpp/4")
"""The solved tasks of the few-shot protocols, from MBPP's prompt split."""

SYSTEM_MESSAGE = "You are an expert Python programmer."
_GRADER = re.compile(r"^def check\(candidate\b", re.MULTILINE)
_FUTURE = "from __future__ import annotations\n"
_EVALPLUS_REQUEST = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
)
_EVALPLUS_PREFILL = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:\n"
    "```python\n"
)
_LM_EVAL_PREFILL = "\n```python\n"


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    chat_template: Any
    """The template's source, or None."""

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        """The conversation as text, up to where the assistant's next turn starts."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptProtocol:
    """One named way of asking and of reading the answer."""

    name: str
    needs_chat_template: bool
    """False: the prompt is plain text for the model to continue."""
    compose: Callable[[Task, Sequence[Task]], list[Message]]
    """The messages for a task and its shots; a plain-text prompt is the content of a single message."""
    extract: Callable[[str, Task], str | None]
    """The program to judge in a completion's text, None if there is no code. Executes nothing, raises nothing."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion besides the model's own end tokens."""
    answered: Callable[[str, str], bool] | None = None
    """Whether a text of whole lines holds the program for an entry point, so that sampling may stop there; None: never.
    What stops early must give the program that the whole answer would have given."""
    prefill: str = ""
    """What the assistant's turn starts with; the model continues it, and it is not part of the completion."""
    shown_tests: int | None = None
    """Shows at most this many of the task's tests; None shows all."""
    signature_alone: bool = False
    """A statement that is a signature is put without any test."""
    shot_ids: tuple[str, ...] = ()
    """The solved tasks to give as `shots`."""

    def render(self, task: Task, tokenizer: Tokenizer, *, shots: Sequence[Task] = ()) -> Prompt:
        """The prompt for `task`; its `task` holds as `tests` only what the prompt shows.

        Raises:
            ConfigError: not as many shots as `shot_ids`, or one without a reference solution.
            ModelError: a chat protocol meets a tokenizer without a template, or a template that refuses the messages.
        """
        self._check_shots(shots)
        presented = self._presented(task)
        messages = self.compose(presented, shots)
        if self.needs_chat_template:
            text = _apply_template(tokenizer, messages, self.name) + self.prefill
        else:
            text = messages[0]["content"]
        # A chat template writes the special tokens itself.
        token_ids = tokenizer.encode(text, add_special_tokens=not self.needs_chat_template)
        return Prompt(task=presented, text=text, token_ids=tuple(token_ids), protocol=self.name, stop=self.stop)

    def _presented(self, task: Task) -> Task:
        graders = tuple(test for test in task.tests if _GRADER.search(test))
        shown = tuple(test for test in task.tests if test not in graders)
        open_to_see = replace(task, tests=shown, hidden_tests=graders + task.hidden_tests)
        return open_to_see.showing(0 if self.signature_alone and _is_signature(task) else self.shown_tests)

    def ends(self, task: Task) -> Callable[[str], bool] | None:
        """The test of a completion's text that ends its sampling early, if the protocol has one."""
        answered = self.answered
        return None if answered is None else lambda text: answered(text, task.entry_point)

    def _check_shots(self, shots: Sequence[Task]) -> None:
        if len(shots) != len(self.shot_ids):
            wanted = f"the {len(self.shot_ids)} tasks {', '.join(self.shot_ids)}" if self.shot_ids else "none"
            raise ConfigError(f"prompt.protocol: {self.name} got {len(shots)} solved tasks as shots, give {wanted}")
        for shot in shots:
            if not shot.reference.strip():
                raise ConfigError(
                    f"prompt.protocol: {self.name} cannot show {shot.task_id}, it has no reference solution"
                )


def get_protocol(name: str) -> PromptProtocol:
    """The protocol of that name.

    Raises:
        ConfigError: there is none; the message names those there are.
    """
    try:
        return PROTOCOLS[name]
    except KeyError:
        known = ", ".join(PROTOCOLS)
        raise ConfigError(f"prompt.protocol: there is no protocol {name!r}, take one of {known}") from None


def render(protocol: PromptProtocol, task: Task, tokenizer: Tokenizer, *, shots: Sequence[Task] = ()) -> Prompt:
    """`protocol.render`, as a function."""
    return protocol.render(task, tokenizer, shots=shots)


def _apply_template(tokenizer: Tokenizer, messages: list[Message], protocol: str) -> str:
    if not tokenizer.chat_template:
        owner = getattr(tokenizer, "name_or_path", "") or "this model"
        raise ModelError(
            f"the tokenizer of {owner} has no chat template, which protocol {protocol} needs: "
            "take protocol mbpp-3shot or bigcode, or an instruct model"
        )
    # Templates are jinja; it is there wherever one can be applied.
    from jinja2.exceptions import TemplateError

    try:
        return _templated(tokenizer, messages)
    except TemplateError as error:
        if messages[0]["role"] != "system":
            raise ModelError(f"the chat template refuses the messages of protocol {protocol}: {error}") from None
    # Some templates (Gemma's) know no system role: its text then opens the user's message.
    system, user, *rest = messages
    return _apply_template(tokenizer, [_user(f"{system['content']}\n\n{user['content']}"), *rest], protocol)


def _templated(tokenizer: Tokenizer, messages: list[Message]) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _is_signature(task: Task) -> bool:
    """The statement is code that opens the function (HumanEval), not a description."""
    return re.search(rf"^def {re.escape(task.entry_point)}\(", task.statement, re.MULTILINE) is not None


def _name_sentence(task: Task) -> str:
    return f"The function must be named `{task.entry_point}`."


def _train_messages(task: Task, _: Sequence[Task]) -> list[Message]:
    if _is_signature(task):
        request = f"Complete this function:\n\n```python\n{task.statement.strip()}\n```"
    else:
        request = task.statement.strip()
        if not task.tests:
            request = f"{request} {_name_sentence(task)}"
    parts = [request]
    if task.tests:
        parts.append("Your code should pass these tests:\n\n" + "\n".join(task.tests))
    parts.append("Answer with one ```python block.")
    return [{"role": "system", "content": SYSTEM_MESSAGE}, _user("\n\n".join(parts))]


def _train_program(text: str, task: Task) -> str | None:
    return extract_code(text, task.entry_point)


def _three_shot_messages(task: Task, shots: Sequence[Task]) -> list[Message]:
    solved = [f"{_three_shot_request(shot)}{shot.reference}\n[DONE]\n\n" for shot in shots]
    return [_user("".join([*solved, _three_shot_request(task)]))]


def _three_shot_request(task: Task) -> str:
    tests = "Your code should pass these tests:\n\n" + "\n".join(task.tests) if task.tests else _name_sentence(task)
    return f"You are an expert Python programmer, and here is your task: {task.statement} {tests}\n[BEGIN]\n"


def _three_shot_program(text: str, _: Task) -> str | None:
    return _non_blank(_until(text, ("[DONE]",)))


def _lm_eval_messages(task: Task, shots: Sequence[Task]) -> list[Message]:
    messages = []
    for shot in shots:
        answer = f"{_LM_EVAL_PREFILL}{shot.reference}\n```"
        messages += [_user(_lm_eval_request(shot)), {"role": "assistant", "content": answer}]
    return [*messages, _user(_lm_eval_request(task))]


def _lm_eval_request(task: Task) -> str:
    tests = "\n".join(["Your code should pass these tests:", *task.tests]) if task.tests else _name_sentence(task)
    return f"You are an expert Python programmer, and here is your task:\n{task.statement}\n{tests}"


def _lm_eval_program(text: str, task: Task) -> str | None:
    code = _non_blank(first_fenced_block(text))
    # The harness's own first line; after a prelude it would be a syntax error.
    return code if code is None or task.prelude.strip() else _FUTURE + code


_BIGCODE_STOP = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")


def _bigcode_messages(task: Task, _: Sequence[Task]) -> list[Message]:
    return [_user(task.statement if _is_signature(task) else _docstring(task))]


def _docstring(task: Task) -> str:
    last = "\n".join(task.tests) or _name_sentence(task)
    return f'"""\n{task.statement}\n{last}\n"""\n'


def _bigcode_program(text: str, task: Task) -> str | None:
    # The harness judges prompt + completion; a prompt that is a docstring does nothing and is left out.
    code = _non_blank(_until(text, _BIGCODE_STOP))
    return task.statement + code if code is not None and _is_signature(task) else code


_EVALPLUS_STOP = (
    "<|endoftext|>",
    "<|endofmask|>",
    "</s>",
    "\nif __name__",
    "\ndef main(",
    "\nprint(",
    "\n```\n",
)


def _evalplus_messages(task: Task, _: Sequence[Task]) -> list[Message]:
    problem = task.statement if _is_signature(task) else _docstring(task)
    return [_user(f"{_EVALPLUS_REQUEST}\n```\n{problem.strip()}\n```\n")]


def _evalplus_program(text: str, task: Task) -> str | None:
    span = longest_valid_span(_until(text, _EVALPLUS_STOP).replace("\t", "    "))
    return None if span is None else reachable_program(span, task.entry_point)


def _until(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _non_blank(code: str) -> str | None:
    return code if code.strip() else None


_ALL = (
    PromptProtocol(
        name="train",
        needs_chat_template=True,
        compose=_train_messages,
        extract=_train_program,
        answered=answered,
    ),
    PromptProtocol(
        name="mbpp-3shot",
        needs_chat_template=False,
        compose=_three_shot_messages,
        extract=_three_shot_program,
        stop=("[DONE]",),
        shot_ids=MBPP_SHOTS,
    ),
    PromptProtocol(
        name="lm-eval-instruct",
        needs_chat_template=True,
        compose=_lm_eval_messages,
        extract=_lm_eval_program,
        prefill=_LM_EVAL_PREFILL,
        shot_ids=MBPP_SHOTS,
    ),
    PromptProtocol(
        name="bigcode",
        needs_chat_template=False,
        compose=_bigcode_messages,
        extract=_bigcode_program,
        stop=_BIGCODE_STOP,
        shown_tests=1,
        signature_alone=True,
    ),
    PromptProtocol(
        name="evalplus-chat",
        needs_chat_template=True,
        compose=_evalplus_messages,
        extract=_evalplus_program,
        stop=_EVALPLUS_STOP,
        prefill=_EVALPLUS_PREFILL,
        shown_tests=1,
        signature_alone=True,
    ),
)

PROTOCOLS: Mapping[str, PromptProtocol] = MappingProxyType({protocol.name: protocol for protocol in _ALL})
"""Every protocol by its name."""
