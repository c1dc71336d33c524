"""What is said between the judging process and one program's process, without any process.

In: bytes that arrived. Out: bytes to send, and the results so far. Believes only lines that are in form and in order,
and test results only with the nonce, which it hands over with the tests once the program's top level has finished.
"""

from __future__ import annotations

import marshal
import re
from dataclasses import dataclass
from typing import Any

from greenloop.sandbox.transcript import BlockResult, LoadResult
from greenloop.seeding import seed_for
from greenloop.types import Task

BLOCK_BYTES = 64
"""What the answer on one more test block needs without its detail."""
LOADED = re.compile(rb"loaded (ok|error|memory) ?([ -~]*)")
BLOCK = re.compile(rb"([0-9a-f]+) ([0-9]{1,9}) (passed|failed|uncalled|error|memory) ?([ -~]*)")


class MalformedAnswerError(Exception):
    """The program's process said something that is too long, out of form, out of order or without the nonce."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One program and the task by which it is judged."""

    task: Task
    program: str
    nonce: str
    """Secret of this one process, hexadecimal."""

    @property
    def test_blocks(self) -> tuple[str, ...]:
        """Shown tests, then hidden ones."""
        return self.task.tests + self.task.hidden_tests

    def opening(self) -> bytes:
        """The message with the program; it holds nothing of the tests."""
        return framed(
            {
                "prelude": self.task.prelude,
                "program": self.program,
                "entry_point": self.task.entry_point,
                "seed": seed_for(0, "program", self.task.task_id),
            }
        )

    def exam(self) -> bytes:
        """The message with the tests and the nonce."""
        blocks = self.test_blocks
        return framed(
            {
                "nonce": self.nonce,
                "setup": self.task.setup,
                "blocks": list(blocks),
                "seeds": [seed_for(0, "test", self.task.task_id, index) for index in range(len(blocks))],
            }
        )


def framed(message: dict[str, Any]) -> bytes:
    """A length of 8 bytes and the marshalled message; only the child ever unmarshals."""
    payload = marshal.dumps(message)
    return len(payload).to_bytes(8, "big") + payload


class Conversation:
    """One conversation: the process says `ready`, then `loaded`, then one line for each test block."""

    def __init__(self, job: Job, reply_bytes: int) -> None:
        self._job = job
        self._bytes_left = reply_bytes + BLOCK_BYTES * len(job.test_blocks)
        self._partial = b""
        self.started = False
        self.load: LoadResult | None = None
        self.load_detail = ""
        self.blocks: list[tuple[BlockResult, str]] = []

    @property
    def complete(self) -> bool:
        """Everything that was to be said has been said."""
        if self.load is LoadResult.OK:
            return len(self.blocks) == len(self._job.test_blocks)
        return self.load is not None

    def hear(self, received: bytes) -> bytes:
        """Take in what arrived; what to send in answer.

        Raises:
            MalformedAnswerError: an honest process would not have said this.
        """
        self._bytes_left -= len(received)
        if self._bytes_left < 0:
            raise MalformedAnswerError("too long")
        *lines, self._partial = (self._partial + received).split(b"\n")
        return b"".join(self._hear_line(line) for line in lines)

    def _hear_line(self, line: bytes) -> bytes:
        if self.complete:
            raise MalformedAnswerError("more than was asked")
        if not self.started:
            return self._hear_ready(line)
        return self._hear_loaded(line) if self.load is None else self._hear_block(line)

    def _hear_ready(self, line: bytes) -> bytes:
        if line != b"ready":
            raise MalformedAnswerError("no greeting")
        self.started = True
        return self._job.opening()

    def _hear_loaded(self, line: bytes) -> bytes:
        form = LOADED.fullmatch(line)
        if form is None:
            raise MalformedAnswerError("out of form")
        self.load, self.load_detail = LoadResult(form[1].decode()), form[2].decode()
        return self._job.exam() if self.load is LoadResult.OK else b""

    def _hear_block(self, line: bytes) -> bytes:
        form = BLOCK.fullmatch(line)
        if form is None or form[1].decode() != self._job.nonce or int(form[2]) != len(self.blocks):
            raise MalformedAnswerError("out of form, out of order or without the nonce")
        self.blocks.append((BlockResult(form[3].decode()), form[4].decode()))
        return b""
