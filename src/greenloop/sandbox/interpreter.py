"""One program in one fresh interpreter, from start to reaping.

In: a job and its limits. Out: a `Transcript`. The process gets an environment of one variable, an empty folder of its
own that is removed afterwards, no input, no output, its own session, and no file descriptor but its two pipes.
Believes nothing that the process does except the lines on its pipe; never reads its exit status as success.

Does not hold: a process that the program forks can leave the process group with `setsid`, and RLIMIT_NPROC does not
bind root; files, network and other processes of this user are within the program's reach.
"""

from __future__ import annotations

import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from tempfile import TemporaryDirectory

from greenloop.sandbox.conversation import Conversation, Job, MalformedAnswerError
from greenloop.sandbox.limits import MIB, Limits
from greenloop.sandbox.transcript import Ending, Transcript

CHILD = Path(__file__).with_name("child.py")
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
CHUNK_BYTES = 64 * 1024
SHORTEST_TICK_S = 0.005
LONGEST_TICK_S = 0.1
GRACE_S = 0.1
"""An ending process closes its pipe some time before the kernel can say how it ended."""


class Flights:
    """The processes that are running now, so that another thread can kill them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pids: set[int] = set()
        self.grounded = False
        """No process may run any more."""

    def take_off(self, pid: int) -> None:
        """Count `pid` as running; it is killed at once if flights are grounded."""
        with self._lock:
            self._pids.add(pid)
            if self.grounded:
                kill_group(pid)

    def land(self, pid: int) -> None:
        """Kill the group of `pid` and count it as over; the caller reaps it after this, so the id cannot be reused."""
        with self._lock:
            kill_group(pid)
            self._pids.discard(pid)

    def ground(self) -> None:
        """Kill everything that runs, now and from now on."""
        with self._lock:
            self.grounded = True
            for pid in self._pids:
                kill_group(pid)


def kill_group(pid: int) -> None:
    """SIGKILL to the process group that the unreaped process `pid` leads."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)


def command(question_fd: int, reply_fd: int, limits: Limits) -> list[str]:
    """The child's command line: flags that keep it reproducible and away from this environment, then its limits."""
    numbers = (
        question_fd,
        reply_fd,
        os.getpid(),
        math.ceil(limits.cpu_s) + 1,  # a back-stop: the parent's clock is the limit
        limits.memory_mib * MIB,
        limits.file_bytes,
        limits.open_files,
    )
    return [sys.executable, "-s", "-S", "-P", "-B", str(CHILD), *map(str, numbers)]


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of the unreaped process `pid`, from the kernel's clock for it."""
    return time.clock_gettime((~pid << 3) | 2)


def has_ended(pid: int) -> bool:
    """The process is over; it stays unreaped."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def comes_to_end(pid: int) -> bool:
    """The process, whose pipe is closed, is over or will be within `GRACE_S`; it stays unreaped."""
    deadline_s = time.monotonic() + GRACE_S
    while not has_ended(pid) and time.monotonic() < deadline_s:
        time.sleep(0.001)
    return has_ended(pid)


class Channel:
    """Our ends of the two pipes to a process; never blocks longer than it is told."""

    def __init__(self, question_fd: int, reply_fd: int) -> None:
        self._question_fd, self._reply_fd = question_fd, reply_fd
        self._unsent = b""
        for fd in (question_fd, reply_fd):
            os.set_blocking(fd, False)

    def send_later(self, message: bytes) -> None:
        """Queue `message`; `exchange` sends it as the process reads."""
        self._unsent += message

    def exchange(self, timeout_s: float) -> bytes | None:
        """Send and receive what is possible now; None: nothing arrived, empty: the process closed its end."""
        poll = select.poll()
        poll.register(self._reply_fd, select.POLLIN)
        if self._unsent:
            poll.register(self._question_fd, select.POLLOUT)
        ready = dict(poll.poll(timeout_s * 1000))
        if self._question_fd in ready:
            self._send()
        return os.read(self._reply_fd, CHUNK_BYTES) if self._reply_fd in ready else None

    def _send(self) -> None:
        try:
            self._unsent = self._unsent[os.write(self._question_fd, self._unsent) :]
        except BrokenPipeError:
            self._unsent = b""


def converse(conversation: Conversation, channel: Channel, pid: int, started_s: float, limits: Limits) -> Ending:
    """Talk with the process until it has answered, died, broken the form or met a limit."""
    while not conversation.complete:
        cpu_left_s = limits.cpu_s - cpu_seconds(pid)
        wall_left_s = started_s + limits.wall_s - time.monotonic()
        if cpu_left_s <= 0:
            return Ending.CPU
        if wall_left_s <= 0:
            return Ending.WALL
        over = has_ended(pid)
        tick_s = 0.0 if over else min(max(cpu_left_s, SHORTEST_TICK_S), wall_left_s, LONGEST_TICK_S)
        received = channel.exchange(tick_s)
        if received == b"" or (over and received is None):
            return Ending.DIED
        try:
            channel.send_later(conversation.hear(received or b""))
        except MalformedAnswerError:
            return Ending.MALFORMED
    return Ending.ANSWERED


def start(question_fd: int, reply_fd: int, folder: str, limits: Limits) -> subprocess.Popen[bytes]:
    """Start the child as leader of its own session; raises OSError where the system refuses."""
    return subprocess.Popen(
        command(question_fd, reply_fd, limits),
        env=ENVIRONMENT,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=True,
        pass_fds=(question_fd, reply_fd),
        start_new_session=True,
    )


def reap(child: subprocess.Popen[bytes]) -> float:
    """Wait for the killed child; the CPU seconds that it and those whom it waited for have used."""
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


def ending_of(ending: Ending, *, started: bool, cpu_s: float, limits: Limits) -> Ending:
    """The ending in the light of what only the reaped process tells."""
    if not started:
        return Ending.NOT_STARTED
    if ending is Ending.DIED and cpu_s >= limits.cpu_s:
        return Ending.CPU
    return ending


def signal_name(returncode: int) -> str:
    """How the process ended by itself, for people."""
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"


def attend(child: subprocess.Popen[bytes], channel: Channel, job: Job, limits: Limits, flights: Flights) -> Transcript:
    """Talk with the started child, then kill its group and reap it, whatever happens."""
    started_s = time.monotonic()
    conversation = Conversation(job, limits.reply_bytes)
    flights.take_off(child.pid)
    try:
        ending = converse(conversation, channel, child.pid, started_s, limits)
        wall_s = time.monotonic() - started_s
        died = ending is Ending.DIED and comes_to_end(child.pid)
    finally:
        flights.land(child.pid)
        cpu_s = reap(child)
    return Transcript(
        ending=ending_of(ending, started=conversation.started, cpu_s=cpu_s, limits=limits),
        load=conversation.load,
        load_detail=conversation.load_detail,
        blocks=tuple(conversation.blocks),
        cpu_s=cpu_s,
        wall_s=wall_s,
        note=signal_name(child.returncode) if died else "",
    )


def run(job: Job, limits: Limits, flights: Flights) -> Transcript:
    """Run one program against its tests in a process of its own; never raises for what the program does."""
    with ExitStack() as open_ends:
        try:
            question_read, question_write = pipe(open_ends)
            reply_read, reply_write = pipe(open_ends)
            folder = open_ends.enter_context(TemporaryDirectory(prefix="greenloop-", ignore_cleanup_errors=True))
            child = start(question_read.fileno(), reply_write.fileno(), folder, limits)
        except OSError as error:
            return Transcript(ending=Ending.NOT_STARTED, load=None, note=str(error))
        question_read.close()
        reply_write.close()
        channel = Channel(question_write.fileno(), reply_read.fileno())
        return attend(child, channel, job, limits, flights)


def pipe(open_ends: ExitStack) -> tuple[FileIO, FileIO]:
    """Read and write end of a new pipe, closed with `open_ends`."""
    read_fd, write_fd = os.pipe()
    return open_ends.enter_context(FileIO(read_fd, "rb")), open_ends.enter_context(FileIO(write_fd, "wb"))
