"""The fork server: one process with the standard library loaded, from which every program's process is forked.

In, over its control socket: `F` with a descriptor (fork; the child gets it as its only one), `K` (kill and reap it).
Out: the child's process id; its wait status, CPU seconds and peak memory. It never sees a test, a program's text or a
secret; it is locked (capabilities, Landlock) before the first fork, and each child adds limits and the call filter.
"""

from __future__ import annotations

import array
import codecs
import gc
import os
import signal
import socket
import struct
import sys

from . import candidate, locks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

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
SPAWN = struct.Struct("=iqqqi")
"""cpu_s, memory, file bytes, open files, whether files may be opened."""
ENDED = struct.Struct("=iddq")
"""Wait status, user and system CPU seconds, peak resident memory in KiB."""


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
    preload()
    filters = {}
    if level != "rlimits-only":
        locks.become_countable()
        locks.drop_privileges()
        if level == "full":
            locks.restrict_files(*locks.library_paths())
        filters[0] = locks.seccomp_filter(locks.MACHINE, may_open=False, may_judge=False)
        filters[1] = locks.seccomp_filter(locks.MACHINE, may_open=True, may_judge=False)
    control = socket.socket(fileno=control_fd)
    os.environ.clear()
    sys.argv[:] = ["candidate"]
    gc.collect()
    gc.freeze()
    control.sendall(b"R")
    serve(control, filters)


def serve(control: socket.socket, filters: dict[int, bytes]) -> NoReturn:
    """Fork and reap, one program at a time."""
    zygote_pid = os.getpid()
    while True:
        message, ancillary, _, _ = control.recvmsg(1 + SPAWN.size, socket.CMSG_LEN(4))
        if message[:1] != b"F" or len(message) != 1 + SPAWN.size or not ancillary:
            os._exit(0)
        fd = array.array("i", ancillary[0][2])[0]
        pid = os.fork()
        if not pid:
            become_candidate(fd, SPAWN.unpack(message[1:]), filters, zygote_pid)
        os.close(fd)
        control.sendall(struct.pack("=i", pid))
        stop = control.recv(1)
        os.kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        control.sendall(ENDED.pack(status, usage.ru_utime, usage.ru_stime, usage.ru_maxrss))
        if stop != b"K":
            os._exit(0)


def become_candidate(
    fd: int, bounds: tuple[int, int, int, int, int], filters: dict[int, bytes], zygote_pid: int
) -> NoReturn:
    """In the fork: one descriptor, limits, the call filter; then the first byte of the program is read."""
    try:
        os.dup2(fd, candidate.SOCKET_FD)
        os.closerange(candidate.SOCKET_FD + 1, 1 << 20)
        locks.die_with_parent(zygote_pid)
        cpu_s, memory_bytes, file_bytes, open_files, may_open = bounds
        locks.limit_resources(cpu_s=cpu_s, memory_bytes=memory_bytes, file_bytes=file_bytes, open_files=open_files)
        if filters:
            locks.restrict_calls(filters[may_open])
        candidate.serve()
    finally:
        os._exit(1)
