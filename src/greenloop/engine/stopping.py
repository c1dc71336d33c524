"""When a completion ends, and its text.

Every end-of-sequence id that the model declares stops (tokenizer, config and generation config may differ), and so do
the prompt protocol's own stop strings and its test for a whole answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from greenloop.types import Finish


class Ending(Protocol):
    """How a request's completions may end before an end token."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Stop strings."""
        ...

    @property
    def ends(self) -> Callable[[str], bool] | None:
        """Asked at each line end whether the text so far is a whole answer."""
        ...


class Stopper:
    """The end tokens of one model and the decoding of its tokens."""

    def __init__(self, tokenizer: Any, end_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        self._ends_a_line: dict[int, bool] = {}

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Stopper:
        """With every end id that the tokenizer, the config and the generation config declare."""
        declared = [tokenizer.eos_token_id]
        for config in (model.config, getattr(model, "generation_config", None)):
            ids = getattr(config, "eos_token_id", None)
            declared.extend(ids if isinstance(ids, list | tuple) else [ids])
        return cls(tokenizer, frozenset(token for token in declared if token is not None))

    def finish(self, tokens: Sequence[int], rule: Ending, limit: int) -> Finish | None:
        """Why the completion ends after its last token, or None."""
        if tokens[-1] in self.end_ids:
            return Finish.EOS
        if (rule.stop and self._stopped(tokens, rule.stop)) or (rule.ends and self._whole(tokens, rule.ends)):
            return Finish.STOP
        return Finish.LENGTH if len(tokens) >= limit else None

    def text(self, tokens: Sequence[int], stop: Sequence[str]) -> str:
        """The decoded completion without special tokens, cut before the first stop string."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        cuts = [at for at in (text.find(string) for string in stop) if at >= 0]
        return text[: min(cuts)] if cuts else text

    def _whole(self, tokens: Sequence[int], ends: Callable[[str], bool]) -> bool:
        """Only a line end can complete an answer."""
        last = tokens[-1]
        if last not in self._ends_a_line:
            self._ends_a_line[last] = "\n" in self.tokenizer.decode([last])
        if not self._ends_a_line[last]:
            return False
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return ends(text[: text.rindex("\n") + 1])

    def _stopped(self, tokens: Sequence[int], stop: Sequence[str]) -> bool:
        # A token is at least one character but for byte pieces (at most 4 a character).
        tail = 4 + max(len(string) for string in stop)
        recent: str = self.tokenizer.decode(list(tokens[-tail:]), skip_special_tokens=True)
        return any(string in recent for string in stop)
