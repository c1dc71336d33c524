"""Notes what a program tries and may not do, by the audit events of its own interpreter (PEP 578).

In: the fork server, once. Out: `tried`, in each program's process. A gauge, no lock: the locks are the kernel's. A
program that calls the kernel past Python (ctypes) is not seen here, and one that wants to can empty the list.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR
_AF_UNIX = 1
_WITH_A_PATH = ("open", "os.listdir", "os.scandir")
REFUSED = frozenset(
    (
        *_WITH_A_PATH, "os.chdir", "os.chmod", "os.chown", "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg",
        "os.link", "os.mkdir", "os.posix_spawn", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.system",
        "os.truncate", "os.utime", "resource.prlimit", "resource.setrlimit", "socket.__new__", "socket.bind",
        "socket.connect", "socket.getaddrinfo", "subprocess.Popen",
    )
)  # fmt: skip
"""Events of what the sandbox refuses; those with a path, and sockets, only in part."""

tried: list[str] = []


def watch(readable: Iterable[str], listable: Iterable[str]) -> None:
    """Note such events from now on, in this process and its forks.

    Args:
        readable: paths under which files may be read.
        listable: folders that may be listed besides.
    """
    allowed = tuple(readable)
    listed = frozenset(listable)

    def is_refused(event: str, args: tuple[Any, ...]) -> bool:
        if event == "socket.__new__":
            return bool(args[1] != _AF_UNIX)  # a pair of them is allowed
        if event not in _WITH_A_PATH:
            return True
        path = args[0]
        if not isinstance(path, str | bytes):
            return path is None  # a descriptor that is open already
        path = os.fsdecode(path)
        writes = event == "open" and type(args[2]) is int and args[2] & _WRITING
        return path != os.devnull and bool(writes or not (path in listed or path.startswith(allowed)))

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event in REFUSED and event not in tried and is_refused(event, args):
            tried.append(event)

    sys.addaudithook(note)
