"""Settings of a process."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from greenloop.tuning import prepare_process
prepare_process()
kept = torch.ones(2**24)
lines = open("/proc/self/smaps").read().splitlines()
inside = False
for line in lines:
    fields = line.split()
    if "-" in fields[0] and not fields[0].endswith(":"):
        begin, end = (int(part, 16) for part in fields[0].split("-"))
        inside = begin <= kept.data_ptr() + kept.nbytes // 2 < end
    elif inside and fields[0] == "VmFlags:":
        print("hg" in fields)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/sys/kernel/mm/transparent_hugepage").is_dir(),
    reason="needs glibc and a kernel with large pages",
)
def test_tensors_lie_where_large_pages_are_asked_for():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["True"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_a_process_that_may_not_have_so_many_addresses_goes_on():
    limited = (
        "import resource, torch; resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32));"
        "from greenloop.tuning import prepare_process; prepare_process(); print(float(torch.ones(9).sum()))"
    )
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["9.0"]
