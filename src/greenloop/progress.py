"""What a person sees while a run goes on. Knows how to draw, nothing else.

On a terminal one live line shows step, pass rate, tokens/s and the time left, under the finished steps; elsewhere (a
log file) each step is one plain line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Reporter(Protocol):
    """Hears of a run's events."""

    def say(self, text: str) -> None:
        """A line of text."""
        ...

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` units starts."""
        ...

    def advance(self, note: str = "") -> None:
        """One unit is done."""
        ...

    def end(self) -> None:
        """The phase is over."""
        ...


class Silent:
    """Shows nothing."""

    def say(self, text: str) -> None:
        """See `Reporter`."""

    def begin(self, phase: str, total: int) -> None:
        """See `Reporter`."""

    def advance(self, note: str = "") -> None:
        """See `Reporter`."""

    def end(self) -> None:
        """See `Reporter`."""


class ConsoleReporter:
    """Draws with rich on a terminal, prints lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None

    def say(self, text: str) -> None:
        """See `Reporter`."""
        (self.bar.console if self.bar else self.console).print(text, highlight=False, soft_wrap=True, markup=False)

    def begin(self, phase: str, total: int) -> None:
        """See `Reporter`."""
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.bar.start()
            self.bar.add_task(phase, total=total, note="")
        else:
            self.say(f"{phase}: {total} to do")

    def advance(self, note: str = "") -> None:
        """See `Reporter`."""
        if self.bar:
            self.bar.update(self.bar.task_ids[0], advance=1, note=note)

    def end(self) -> None:
        """See `Reporter`."""
        if self.bar:
            self.bar.stop()
            self.bar = None


def step_line(record: Mapping[str, Any], steps: int) -> str:
    """One finished step for people."""
    seconds = record["seconds"]["total"]
    shown = "  -  " if record["pass_rate"] is None else f"{record['pass_rate']:5.0%}"
    signs = [f"{count} {sign.replace('_', ' ')}" for sign, count in record["gauges"].items() if count]
    return (
        f"step {record['step'] + 1:>3}/{steps}  pass {shown}  ran {record['ran'] or 0:4.0%}  "
        f"reward {record['reward'] or 0:5.2f}  dead {record['dead_groups']}/{len(record['tasks'])}  "
        f"{record['length_mean']:.0f} tokens each  {record['tokens_per_s']['rollout']:.0f} tokens/s  {seconds:.1f} s"
        + (f"  [{', '.join(signs)}]" if signs else "")
    )
