"""What is asked of a rollout engine, and what an engine is. Knows no tensor, so callers start without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from greenloop.types import Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 256

    @property
    def greedy(self) -> bool:
        """The likeliest token always; nothing random."""
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """Some tokens are cut off before the draw."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how many completions are wanted of it."""

    token_ids: tuple[int, ...]
    samples: int
    seed: int
    """Sample k draws from `seed_for(seed, k)`, whatever runs beside it."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; they and what follows are not part of its text."""
    ends: Callable[[str], bool] | None = None
    """Asked at each line end whether the text so far is a whole answer."""
    greedy: bool = False
    """The likeliest token always, whatever temperature the others are drawn at."""

    def sampling(self, common: Sampling) -> Sampling:
        """How this request's tokens are drawn beside others that are drawn by `common`."""
        return replace(common, temperature=0.0) if self.greedy else common


class Generator(Protocol):
    """A rollout engine."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Every request's completions, each as soon as it ends."""
        ...

    def refresh(self) -> None:
        """Take the adapter's present values."""
        ...
