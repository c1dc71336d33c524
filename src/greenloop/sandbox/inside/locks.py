"""What a process gives up for good: capabilities, new privileges, files (Landlock), system calls (seccomp), resources.

In: the calling process. Out: the same process with less. Every function raises OSError where the kernel refuses;
nothing is skipped in silence. Order: no new privileges, capabilities, Landlock, limits, seccomp last.

Sources: prctl(2), capset(2), landlock(7), seccomp(2), and the kernel's Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 22, 24, 38, 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522
LAST_CAPABILITY = 63
NOBODY = 65534
TASKS = 4096
"""Threads of all processes of one user together: enough beside a desktop, far from the machine's limit."""
SPARE_TASKS = 64
"""Fewer for programs than for the fork servers beside them, which must be able to fork whatever a program does."""

MACHINE = platform.machine()
_CALLS = {
    "x86_64": {"capset": 126, "seccomp": 317},
    "aarch64": {"capset": 91, "seccomp": 277},
}
SUPPORTED = tuple(_CALLS)
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(option: int, argument: int, second: int = 0) -> None:
    _checked(_libc.prctl(option, argument, second, 0, 0), f"prctl {option}")


def die_with_parent(parent_pid: int) -> None:
    """SIGKILL for this process when its parent ends; ends at once if that happened already."""
    _prctl(PR_SET_PDEATHSIG, 9)
    if os.getppid() != parent_pid:
        os._exit(1)


def drop_privileges() -> None:
    """No new privileges and no capability in any set; file owners keep their rights, nothing more."""
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    for capability in range(LAST_CAPABILITY + 1):
        # EINVAL: past the last one; EPERM: no CAP_SETPCAP, so the set is not ours to use either.
        _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = ctypes.create_string_buffer(struct.pack("=Ii", CAPABILITY_VERSION_3, 0))
    nothing = ctypes.create_string_buffer(bytes(24))
    _checked(_syscall(_CALLS[MACHINE]["capset"], header, nothing), "capset")


WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
NET_BIND_CONNECT = 0b11
SCOPE_SOCKETS_AND_SIGNALS = 0b11
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Landlock ABI to the number of file rights that it knows (EXECUTE is the first bit)."""


def landlock_abi() -> int:
    """The kernel's Landlock version; 0 where there is none."""
    return max(0, int(_syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))))


def restrict_files(readable: Iterable[str], listable: Iterable[str] = ()) -> None:
    """Landlock: of the file system only reading under `readable`, listing `listable` and writing to /dev/null.

    Also no TCP, no abstract sockets and no signals to outside, where the kernel's Landlock knows them.
    """
    abi = landlock_abi()
    if not abi:
        raise OSError(errno.ENOSYS, "landlock: not in this kernel")
    rights = (1 << _FILE_RIGHTS.get(abi, 16)) - 1
    parts = [rights]
    if abi >= 4:
        parts.append(NET_BIND_CONNECT)
    if abi >= 6:
        parts.append(SCOPE_SOCKETS_AND_SIGNALS)
    attributes = ctypes.create_string_buffer(struct.pack(f"={len(parts)}Q", *parts))
    size = ctypes.c_size_t(8 * len(parts))
    ruleset = _checked(_syscall(LANDLOCK_CREATE, attributes, size, ctypes.c_uint32(0)), "landlock_create_ruleset")
    try:
        for path in readable:
            # READ_DIR on a plain file is EINVAL.
            _allow(ruleset, path, READ_FILE | (READ_DIR if os.path.isdir(path) else 0))
        for path in listable:
            _allow(ruleset, path, READ_DIR)
        _allow(ruleset, os.devnull, READ_FILE | WRITE_FILE)
        _checked(_syscall(LANDLOCK_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0)), "landlock_restrict_self")
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, fd))
        _checked(
            _syscall(LANDLOCK_ADD, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0)),
            "landlock_add_rule",
        )
    finally:
        os.close(fd)


def library_paths() -> tuple[list[str], list[str]]:
    """What an interpreter reads when it imports from the standard library: paths to read, and folders to list.

    Installed packages are not among them (greenloop's own, with its hidden tests, may lie there), so the library's
    folder is listed as a whole but read entry by entry.
    """
    library = os.path.dirname(os.path.realpath(os.__file__))
    entries = [entry for entry in os.listdir(library) if entry not in ("site-packages", "dist-packages")]
    readable = [os.path.join(library, entry) for entry in entries]
    shared = os.path.join(sys.base_prefix, "lib")
    if os.path.isdir(shared):
        readable += [os.path.join(shared, entry) for entry in os.listdir(shared) if ".so" in entry]
    for folder in ("/lib", "/usr/lib"):
        readable.append(f"{folder}/{MACHINE}-linux-gnu")
    for folder in ("/lib64", "/usr/lib64"):
        if os.path.isdir(folder):
            readable += [os.path.join(folder, entry) for entry in os.listdir(folder) if not entry.startswith("python")]
    readable += ["/etc/ld.so.cache", "/usr/share/zoneinfo"]
    return readable, [library]


def become_countable() -> None:
    """Give root another real user: the kernel bounds the threads of every user but root (RLIMIT_NPROC).

    The effective user stays, so that an interpreter in root's own home can still be read.
    """
    if os.getuid() == 0:
        # Where only root is mapped, root is an ordinary user outside and is counted as such.
        with contextlib.suppress(OSError):
            os.setresuid(NOBODY, 0, 0)


def limit_resources(*, cpu_s: int, memory_bytes: int, file_bytes: int, open_files: int) -> None:
    """Bound this process for good."""
    tasks = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    for kind, limit in (
        (resource.RLIMIT_NPROC, TASKS if tasks == resource.RLIM_INFINITY else min(TASKS, max(tasks - SPARE_TASKS, 1))),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, open_files),
        (resource.RLIMIT_AS, memory_bytes),
    ):
        ceiling = resource.getrlimit(kind)[1]
        bounded = limit if ceiling == resource.RLIM_INFINITY else min(limit, ceiling)
        resource.setrlimit(kind, (bounded, bounded))


# Numbers of the system calls that an interpreter with threads needs, and no more.
_COMMON = {
    "x86_64": (
        0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 20, 24, 25, 28, 35, 39, 60, 63, 96, 97, 98, 99, 100, 102, 104,
        107, 108, 110, 131, 186, 202, 204, 218, 219, 228, 229, 230, 231, 262, 273, 318, 324, 332, 334,
        7, 23, 270, 271, 36, 37, 38, 21, 269, 439, 4, 6, 79, 89, 217, 267, 201, 309, 32, 33, 292, 232, 233, 281, 291,
        290, 22, 293, 45, 48,
    ),
    "aarch64": (
        63, 64, 57, 80, 62, 222, 226, 215, 214, 134, 135, 139, 67, 65, 66, 124, 216, 233, 101, 172, 93, 160, 169, 163,
        165, 179, 153, 174, 176, 175, 177, 173, 132, 178, 98, 123, 96, 128, 113, 114, 115, 94, 79, 99, 278, 283, 291,
        293, 207, 210, 73, 72, 102, 103, 48, 439, 17, 78, 61, 168, 23, 24, 20, 21, 22, 19, 59,
    ),
}  # fmt: skip
"""read write close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn pread64 readv writev
sched_yield mremap madvise nanosleep getpid exit uname gettimeofday getrlimit getrusage sysinfo times getuid getgid
geteuid getegid getppid sigaltstack gettid futex sched_getaffinity set_tid_address restart_syscall clock_gettime
clock_getres clock_nanosleep exit_group newfstatat set_robust_list getrandom membarrier statx rseq, poll and select,
interval timers, recvfrom, shutdown, access, stat, getcwd, readlink, getdents64, time, getcpu, dup, epoll, eventfd and
pipe."""
_OPENING = {"x86_64": (2, 257), "aarch64": (56,)}
"""open, openat: left out at level `no-open`."""
_JUDGING = {"x86_64": (46, 47), "aarch64": (211, 212)}
"""sendmsg recvmsg: descriptors go to the fork server."""
_SERVING = {"x86_64": (61, 247, 62, 157, 436), "aarch64": (260, 95, 129, 167, 436)}
"""wait4 waitid kill prctl close_range: the fork server's own, and what a program's process needs before it is one."""
_SPECIAL = {
    "x86_64": {"clone": 56, "clone3": 435, "ioctl": 16, "fcntl": 72, "prlimit64": 302, "socketpair": 53, "sendto": 44},
    "aarch64": {
        "clone": 220,
        "clone3": 435,
        "ioctl": 29,
        "fcntl": 25,
        "prlimit64": 261,
        "socketpair": 199,
        "sendto": 206,
    },
}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_LD_ABS, _JEQ, _JGE, _JSET, _AND, _RET = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NR, _ARCH, _ARGS = 0, 4, 16
_CLONE_THREAD, _TCGETS, _FIONBIO, _X32 = 0x10000, 0x5401, 0x5421, 0x40000000
_F_SETFL, _F_GETLK, _F_DUPFD_CLOEXEC = 4, 5, 1030
_AF_UNIX, _SOCK_STREAM = 1, 1


def _argument(index: int, *, high: bool = False) -> int:
    return _ARGS + 8 * index + 4 * high


def seccomp_filter(machine: str, *, may_open: bool, may_judge: bool = False, may_serve: bool = False) -> bytes:
    """The filter as BPF: an allow-list, everything else EPERM; a foreign architecture ends the process.

    Args:
        machine: as `platform.machine()` says.
        may_open: files may be opened (Landlock says which).
        may_judge: messages with descriptors, for the judge.
        may_serve: also what the fork server needs to fork, bound and reap a program's process. The process itself
            then gives these up by `program_filter`.
    """
    special = _SPECIAL[machine]
    program: list[tuple[int, int, int, int]] = [
        (_LD_ABS, 0, 0, _ARCH),
        (_JEQ, 1, 0, _AUDIT_ARCH[machine]),
        (_RET, 0, 0, _KILL),
        (_LD_ABS, 0, 0, _NR),
    ]
    if machine == "x86_64":
        program += [(_JGE, 0, 1, _X32), (_RET, 0, 0, _KILL)]
    allowed = [*_COMMON[machine]]
    allowed += _OPENING[machine] if may_open else ()
    allowed += _JUDGING[machine] if may_judge or may_serve else ()
    allowed += (*_SERVING[machine], special["clone"], special["prlimit64"]) if may_serve else ()
    for number in allowed:
        program += [(_JEQ, 0, 1, number), (_RET, 0, 0, _ALLOW)]
    program += [(_JEQ, 0, 1, special["clone3"]), (_RET, 0, 0, _ERRNO | errno.ENOSYS)]
    if not may_serve:
        program += _narrowed(special)
    program += _guarded(special["ioctl"], [(_LD_ABS, 0, 0, _argument(1)), (_JEQ, 0, 1, _TCGETS)])
    program += _guarded(special["fcntl"], [(_LD_ABS, 0, 0, _argument(1)), (_JGE, 1, 0, _F_GETLK)])
    program += _guarded(special["fcntl"], [(_LD_ABS, 0, 0, _argument(1)), (_JEQ, 0, 1, _F_DUPFD_CLOEXEC)])
    program += _guarded(special["ioctl"], [(_LD_ABS, 0, 0, _argument(1)), (_JEQ, 0, 1, _FIONBIO)])
    # A pair of stream sockets reaches nobody else, and without an address nothing can be sent past its other end.
    pair = [(_LD_ABS, 0, 0, _argument(0)), (_JEQ, 0, 4, _AF_UNIX)]
    kind = [(_LD_ABS, 0, 0, _argument(1)), (_AND, 0, 0, 0xF), (_JEQ, 0, 1, _SOCK_STREAM)]
    program += _guarded(special["socketpair"], [*pair, *kind])
    program += _guarded(special["sendto"], _is_null(4))
    program.append((_RET, 0, 0, _ERRNO | errno.EPERM))
    return _assembled(program)


def program_filter(machine: str) -> bytes:
    """What a program's process gives up beyond its fork server's filter: all that only serving needs.

    Of several filters the kernel takes the strictest answer, so the two together allow exactly what
    `seccomp_filter(machine, may_open=...)` allows. Installing that one in each process took 0.5 ms: the kernel
    runs a new filter once for every system call number that was allowed before, to remember what it always allows.
    """
    special = _SPECIAL[machine]
    program: list[tuple[int, int, int, int]] = [(_LD_ABS, 0, 0, _NR)]
    for number in (*_SERVING[machine], *_JUDGING[machine]):
        program += [(_JEQ, 0, 1, number), (_RET, 0, 0, _ERRNO | errno.EPERM)]
    program += _narrowed(special)
    for number in (special["clone"], special["prlimit64"]):
        program += [(_JEQ, 0, 1, number), (_RET, 0, 0, _ERRNO | errno.EPERM)]
    program.append((_RET, 0, 0, _ALLOW))
    return _assembled(program)


def _narrowed(special: dict[str, int]) -> list[tuple[int, int, int, int]]:
    """Of the fork server's calls: threads but no processes, limits to read but not to set.

    Also no flags of descriptors 0 to 2: programs share them, and could leave one another notes.
    """
    program = _guarded(special["clone"], [(_LD_ABS, 0, 0, _argument(0)), (_JSET, 0, 1, _CLONE_THREAD)])
    program += _guarded(special["prlimit64"], _is_null(2))
    for call, command in ((special["fcntl"], _F_SETFL), (special["ioctl"], _FIONBIO)):
        condition = [
            (_LD_ABS, 0, 0, _argument(1)),
            (_JEQ, 0, 3, command),
            (_LD_ABS, 0, 0, _argument(0)),
            (_JGE, 1, 0, 3),
        ]
        body = [*condition, (_RET, 0, 0, _ERRNO | errno.EPERM), (_LD_ABS, 0, 0, _NR)]
        program += [(_JEQ, 0, len(body), call), *body]
    return program


def _assembled(program: Iterable[tuple[int, int, int, int]]) -> bytes:
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _is_null(index: int) -> list[tuple[int, int, int, int]]:
    """Condition: the pointer argument is 0, both halves of it."""
    return [
        (_LD_ABS, 0, 0, _argument(index)),
        (_JEQ, 0, 3, 0),
        (_LD_ABS, 0, 0, _argument(index, high=True)),
        (_JEQ, 0, 1, 0),
    ]


def _guarded(number: int, condition: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Allow system call `number` if `condition` holds; a failing condition jumps over the RET that follows it."""
    body = [*condition, (_RET, 0, 0, _ALLOW), (_LD_ABS, 0, 0, _NR)]
    return [(_JEQ, 0, len(body), number), *body]


class CallFilter:
    """A filter laid out in memory as the kernel reads it, ready to be installed in a fork at no cost."""

    def __init__(self, program: bytes) -> None:
        self._instructions = ctypes.create_string_buffer(program)
        header = struct.pack("@HP", len(program) // 8, ctypes.addressof(self._instructions))
        self._header = ctypes.create_string_buffer(header)
        self._address = ctypes.addressof(self._header)

    def install(self) -> None:
        """Restrict this process for good."""
        _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, self._address)
