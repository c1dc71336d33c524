"""The threads that run native code: PyTorch's own.

A second team would fight PyTorch's for the cores, because threads of OpenMP wait for their next work without sleeping.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from greenloop.decoder.native.layout import OUTPUTS, ROWS
from greenloop.places import cache_dir

_PACKAGE = "greenloop.decoder.native"
_MODULES = ("code", "sums_code", "rows_code", "attention_code")
"""In the order in which they are loaded; the first takes as long to compile as the others together."""


class _Switch:
    """Whether native code runs in this process, where it can."""

    on = True


def available() -> bool:
    """Whether this process can make and run native code, and may."""
    return _Switch.on and _possible()


@functools.cache
def _possible() -> bool:
    return importlib.util.find_spec("numba") is not None and _openmp() is not None


def leave_off() -> None:
    """Run no native code in this process; what holds some already keeps it."""
    _Switch.on = False


@contextlib.contextmanager
def without_native_code() -> Iterator[None]:
    """Run none meanwhile."""
    before, _Switch.on = _Switch.on, False
    try:
        yield
    finally:
        _Switch.on = before


def is_trusted() -> bool:
    """Whether this code was found right on this processor."""
    return _mark().is_file()


def trust() -> None:
    """Keep that it was; without effect where nothing can be kept."""
    with contextlib.suppress(OSError):
        _mark().touch()


def _mark(what: str = "right") -> Path:
    """Stands beside code that was found right, or beside the code of the module that it names."""
    return _kept_code() / what


def _is_made() -> bool:
    """Whether all modules are compiled."""
    return all(_mark(module).is_file() for module in _MODULES)


@functools.cache
def compiled(module: str = "code") -> Any:
    """The module `code` or one of its kind, compiled for this processor by an earlier process.

    Functions that several modules share are those of the module that comes first, and in a process that compiles they
    are others, which round otherwise. So code is made in processes of its own and loaded in one order by all.
    """
    import numba

    if not _is_made():
        _make()
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(_kept_code())
    try:
        loaded = {one: importlib.import_module(f"{_PACKAGE}.{one}") for one in _MODULES}
    finally:
        numba.config.CACHE_DIR = before
    return loaded[module]


def begin() -> None:
    """Compile in the background what `compiled` would have to wait for."""
    if available() and not _is_made():
        with contextlib.suppress(OSError):
            _makers()


@functools.cache
def _makers() -> list[subprocess.Popen[str]]:
    """The processes that compile, beside each other; they end with this one.

    Raises:
        OSError: one cannot be started.
    """
    return [_maker(modules) for modules in (_MODULES[:1], _MODULES[1:])]


def _maker(modules: Sequence[str]) -> subprocess.Popen[str]:
    # It leaves the marks itself: a model that runs no native code does not wait for it, and should not begin it again.
    program = (
        "import importlib, pathlib, sys\n"
        "for name in sys.argv[3:]:\n"
        "    importlib.import_module(f'{sys.argv[1]}.{name}')\n"
        "    pathlib.Path(sys.argv[2], name).touch()"
    )
    places = {"NUMBA_CACHE_DIR": str(_kept_code()), "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    maker = subprocess.Popen(
        [sys.executable, "-P", "-c", program, _PACKAGE, str(_kept_code()), *modules],
        env=os.environ | places,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    atexit.register(maker.kill)
    return maker


def _make() -> None:
    """Compile in other processes. Where that fails this one compiles what it needs, all the same, and says so."""
    try:
        failures = [failure for maker in _makers() if (failure := _failure(maker))]
    except OSError as error:
        failures = [str(error)]
    if failures:
        warnings.warn(
            f"native code could not be compiled in a process of its own ({failures[0]}); this process compiles it, and "
            "its numbers may differ in their last bits from those of one that finds it compiled",
            RuntimeWarning,
            stacklevel=2,
        )


def _failure(maker: subprocess.Popen[str]) -> str | None:
    """What a process that compiles complained of last, when it has ended; None if it did not fail."""
    complaint = maker.communicate()[1].strip().splitlines()
    return (complaint or [f"exit status {maker.returncode}"])[-1] if maker.returncode else None


@functools.cache
def _kept_code() -> Path:
    """Where compiled code is kept: a folder for exactly these sources and this machine, or one for this process alone.

    Numba knows a function by the file that it stands in; this code is put together from several. It finds none that was
    compiled from files of another place or for another Python, so those have folders of their own; and so have
    processors and compilers, since two machines that share a folder would write over each other's list of it.
    """
    place = Path(__file__).resolve().parent
    parts = [source.read_bytes() for source in sorted(place.glob("*.py"))]
    parts.append(f"{ROWS} {OUTPUTS} {place} {sys.implementation.cache_tag} {_compiler()}".encode())
    digest = hashlib.sha256(b"".join(parts)).hexdigest()
    folder = cache_dir() / "native" / digest[:16]
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        return folder
    alone = Path(tempfile.mkdtemp(prefix="greenloop-"))
    atexit.register(shutil.rmtree, alone, ignore_errors=True)
    return alone


def _compiler() -> str:
    """What compiles, and for which processor."""
    import numba
    from llvmlite import binding

    named = f"{numba.config.CPU_NAME} {numba.config.CPU_FEATURES} {numba.config.ENABLE_AVX}"
    found = f"{binding.get_host_cpu_name()} {binding.get_host_cpu_features().flatten()}"
    return f"{numba.__version__} {named} {found}"


def run(function: int, argument: int, threads: int) -> None:
    """Call the C function `void (*)(void *)` at an address with one argument, in so many threads at once.

    Args:
        function: the address of the function.
        argument: the address that every thread is given.
        threads: at most so many.
    """
    openmp = _openmp()
    assert openmp is not None, "available was not asked"
    openmp.GOMP_parallel(function, argument, threads, 0)


def meeting(met: int) -> dict[str, int]:
    """The fields of a record whose threads wait for each other.

    Args:
        met: address of an int64 0.
    """
    return {"met": met, **_functions()}


@functools.cache
def _functions() -> dict[str, int]:
    """Addresses of `int omp_get_num_threads()`, how many threads run what calls it, and of `int sched_yield()`."""
    functions = {"team_size": _openmp().omp_get_num_threads, "give_way": ctypes.CDLL(None).sched_yield}
    return {name: ctypes.cast(function, ctypes.c_void_p).value or 0 for name, function in functions.items()}


@functools.cache
def _openmp() -> Any:
    """The OpenMP runtime that PyTorch has loaded, if it answers to `GOMP_parallel`.

    That is the entry that GCC compiles a parallel region to (libgomp's ABI); LLVM's runtime has it as well. Of several
    runtimes PyTorch's is the one that was installed with it.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return None
    # torch/lib or torch.libs.
    own = str(Path(torch.__file__).parent)
    loaded = {fields[5] for line in maps.splitlines() if len(fields := line.split(maxsplit=5)) > 5}
    runtimes = {path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))}
    for path in sorted(runtimes, key=lambda path: (not path.startswith(own), path)):
        library = ctypes.CDLL(path)
        if hasattr(library, "GOMP_parallel"):
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            return library
    return None
