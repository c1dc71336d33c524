"""One judge process as the trainer sees it: start it, send it a program, read what it saw, kill it when it hangs.

In: jobs. Out: `Transcript`s. The judge is trusted to be honest but not to be alive: every read has a deadline.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from greenloop.sandbox.inside.judge import GRACE_S, bootstrap
from greenloop.sandbox.limits import Limits
from greenloop.sandbox.transcript import BlockResult, Ending, LoadResult, Transcript
from greenloop.seeding import seed_for
from greenloop.types import Task

START_S = 20.0
SLACK_S = 3.0
"""Beyond the judge's own deadline, before it is taken for hung."""
ANSWER_BYTES = 16 << 20
ENDINGS = {
    "answered": Ending.ANSWERED,
    "cpu": Ending.CPU,
    "wall": Ending.WALL,
    "died": Ending.DIED,
    "malformed": Ending.MALFORMED,
}


class WorkerError(Exception):
    """The judge did not start, ended, or hung; says how."""


class WorkerHungError(WorkerError):
    """The judge did not answer in time."""


class Worker:
    """A judge with its fork server; not for two threads at a time."""

    def __init__(self, mode: str, cpu: int | None = None) -> None:
        """Start it.

        Args:
            mode: `auto`, `no-open` or `rlimits-only`.
            cpu: where it and its programs run; None leaves that to the kernel.

        Raises:
            WorkerError: it did not start; says why.
        """
        try:
            self.process = subprocess.Popen(
                bootstrap(f"judge.main({mode!r}, {cpu!r})"),
                env={"PYTHONHASHSEED": "0"},
                cwd="/",
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                close_fds=True,
            )
        except OSError as error:
            raise WorkerError(f"the judge cannot be started ({error.strerror})") from None
        assert self.process.stdin
        assert self.process.stdout
        self._questions, self._answers = self.process.stdin, self.process.stdout.fileno()
        os.set_blocking(self._answers, False)
        self.judged, self.cpu = 0, cpu
        try:
            greeting = self._read(START_S)
        except WorkerError:
            self.close()
            raise
        if "error" in greeting:
            self.close()
            raise WorkerError(str(greeting["error"]))
        self.level: str = greeting["level"]

    def judge(self, task: Task, program: str, limits: Limits) -> Transcript:
        """What was seen of one program.

        Raises:
            WorkerError: the judge ended or hung; this worker is of no more use.
        """
        self.judged += 1
        blocks = task.tests + task.hidden_tests
        self._send(
            {
                "prelude": task.prelude,
                "program": program,
                "entry_point": task.entry_point,
                "seed": seed_for(0, "program", task.task_id),
                "setup": task.setup,
                "blocks": blocks,
                "seeds": [seed_for(0, "test", task.task_id, index) for index in range(len(blocks))],
                "limits": asdict(limits),
            }
        )
        return _transcript(self._read(limits.wall_s + GRACE_S + SLACK_S))

    def close(self) -> None:
        """Kill it; its fork server and the program die with it."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream
            with suppress(OSError):  # what could not be flushed is of no use any more
                stream.close()

    def _send(self, job: dict[str, Any]) -> None:
        data = json.dumps(job).encode()
        try:
            self._questions.write(len(data).to_bytes(4, "big") + data)
            self._questions.flush()
        except OSError as error:
            raise WorkerError(f"the judge ended ({error.strerror})") from None

    def _read(self, patience_s: float) -> dict[str, Any]:
        deadline_s = time.monotonic() + patience_s
        size = int.from_bytes(self._exactly(4, deadline_s), "big")
        if size > ANSWER_BYTES:
            raise WorkerError("the judge answered out of form")
        answer: dict[str, Any] = json.loads(self._exactly(size, deadline_s))
        return answer

    def _exactly(self, count: int, deadline_s: float) -> bytes:
        chunks: list[bytes] = []
        while count:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise WorkerHungError("the judge hung")
            if not select.select([self._answers], [], [], left_s)[0]:
                continue
            chunk = os.read(self._answers, count)
            if not chunk:
                raise WorkerError("the judge ended")
            chunks.append(chunk)
            count -= len(chunk)
        return b"".join(chunks)


def _transcript(seen: dict[str, Any]) -> Transcript:
    return Transcript(
        ending=ENDINGS[seen["ending"]],
        load=None if seen["load"] is None else LoadResult(seen["load"]),
        load_detail=seen["load_detail"],
        blocks=tuple((BlockResult(kind), detail) for kind, detail in seen["blocks"]),
        cpu_s=seen["cpu_s"],
        wall_s=seen["wall_s"],
        note=seen["note"],
        exited=seen["exited"],
    )
