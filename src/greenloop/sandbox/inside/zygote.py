"""The fork server: one process with the standard library loaded, from which every program's process is forked.

In, over its control socket: `F` with bounds (a process for a program), `K` (kill and reap it). Out: the process's id
with the descriptor of its line; its wait status and CPU seconds. It never sees a test, a program's text or a secret; it
is locked (capabilities, Landlock, system calls) before the first fork, and each child adds limits and gives up the
calls that only a fork server needs. One child more than is in use waits, locked, for its program.
"""

from __future__ import annotations

import codecs
import ctypes
import gc
import os
import signal
import socket
import struct
import sys

from . import candidate, locks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

PRELOADED = (
    "abc", "array", "bisect", "calendar", "cmath", "collections", "collections.abc", "concurrent.futures",
    "concurrent.futures.thread", "contextlib", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions",
    "functools", "hashlib", "heapq", "inspect", "io", "itertools", "json", "math", "numbers", "operator", "os", "queue",
    "random", "re", "statistics", "string", "struct", "sys", "textwrap", "threading", "time", "types", "typing",
    "unicodedata", "uuid", "warnings",
)  # fmt: skip
CODECS = (
    "ascii", "base64", "bz2", "cp1252", "cp437", "hex", "idna", "latin-1", "punycode", "raw_unicode_escape", "rot13",
    "unicode_escape", "utf-16", "utf-16-le", "utf-32", "utf-7", "utf-8", "utf-8-sig", "zlib",
)  # fmt: skip
BOUNDS = struct.Struct("=iqqq")
"""cpu_s, memory, file bytes, open files."""
READY = b"ready"
PID = struct.Struct("=i")
ENDED = struct.Struct("=idd")
"""Wait status, user and system CPU seconds."""

_fork = ctypes.PyDLL(None).fork
"""As `os.fork` without the interpreter's handlers, which repair what other threads may have held: this process has no
other thread. They cost half of the page faults of a program's process."""


def preload() -> None:
    """Load what a program or a test may need: later it would cost time, or fail without files."""
    for name in PRELOADED:
        __import__(name)
    for codec in CODECS:
        codecs.lookup(codec)


def main(control_fd: int, level: str) -> NoReturn:
    """Serve until the judge closes the control socket.

    Args:
        control_fd: the socket to the judge.
        level: `full`, `no-open` or `rlimits-only`.
    """
    locks.die_with_parent(os.getppid())
    control = socket.socket(fileno=control_fd)
    preload()
    try:
        last_filter = confine(level)
    except OSError as error:
        control.sendall(str(error).encode())
        os._exit(1)
    candidate.rehearse(candidate.REHEARSALS)
    os.environ.clear()
    sys.argv[:] = ["candidate"]
    gc.collect()
    gc.freeze()
    control.sendall(READY)
    serve(control, last_filter)


def confine(level: str) -> locks.CallFilter | None:
    """Lock this process and so all that it forks; what each fork has to add.

    Raises:
        OSError: the kernel refuses a lock.
    """
    if level == "rlimits-only":
        return None
    locks.become_countable()
    locks.drop_privileges()
    if level == "full":
        locks.restrict_files(*locks.library_paths())
    last_filter = locks.CallFilter(locks.program_filter(locks.MACHINE))
    serving = locks.seccomp_filter(locks.MACHINE, may_open=level == "full", may_serve=True)
    locks.CallFilter(serving).install()
    return last_filter


def serve(control: socket.socket, last_filter: locks.CallFilter | None) -> NoReturn:
    """Hand processes over and reap them, one at a time; the next one is made while the judge asks the last."""
    bounds, spare = b"", None
    while True:
        message = control.recv(1 + BOUNDS.size)
        if message[:1] != b"F" or len(message) != 1 + BOUNDS.size:
            os._exit(0)
        if spare is not None and (message[1:] != bounds or not is_alive(spare[0])):
            spare[1].close()
            reap(spare[0])
            spare = None
        bounds = message[1:]
        pid, line = spare or spawn(bounds, last_filter) or os._exit(1)
        socket.send_fds(control, [PID.pack(pid)], [line.fileno()])
        line.close()
        spare = spawn(bounds, last_filter)
        stop = control.recv(1)
        status, usage = reap(pid)
        control.sendall(ENDED.pack(status, usage.ru_utime, usage.ru_stime))
        if stop != b"K":
            os._exit(0)


def is_alive(pid: int) -> bool:
    """Whether a process that waits for its program still does."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def spawn(bounds: bytes, last_filter: locks.CallFilter | None) -> tuple[int, socket.socket] | None:
    """A new locked process that waits for its program; its id and the judge's end of its line.

    None: the kernel has no room for one at the moment.
    """
    judges, programs = socket.socketpair()
    zygote_pid = os.getpid()
    pid = _fork()
    if not pid:
        become_candidate(programs.fileno(), BOUNDS.unpack(bounds), last_filter, zygote_pid)
    programs.close()
    if pid < 0:
        judges.close()
        return None
    return pid, judges


def reap(pid: int) -> tuple[int, Any]:
    """Kill the process; its wait status and what it used."""
    os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    return status, usage


def become_candidate(
    fd: int, bounds: tuple[int, int, int, int], last_filter: locks.CallFilter | None, zygote_pid: int
) -> NoReturn:
    """In the fork: one descriptor, limits, the rest of the call filter; then the first byte of the program is read."""
    try:
        os.dup2(fd, candidate.SOCKET_FD)
        os.closerange(candidate.SOCKET_FD + 1, 1 << 20)
        locks.die_with_parent(zygote_pid)
        cpu_s, memory_bytes, file_bytes, open_files = bounds
        locks.limit_resources(cpu_s=cpu_s, memory_bytes=memory_bytes, file_bytes=file_bytes, open_files=open_files)
        if last_filter:
            last_filter.install()
        candidate.serve()
    finally:
        os._exit(1)
