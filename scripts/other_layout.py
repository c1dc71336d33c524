"""Run the tests of native code with the block sizes of the processors that this one is not.

    python scripts/other_layout.py

Blocks are of one size where there is AVX-512 and of another where there is not (`decoder/native/layout.py`); code of
either size runs everywhere. So a machine tests both.
"""

import os
import sys

import pytest
import torch


def main() -> int:
    """The tests' exit status."""
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    # Before the package reads it.
    os.environ["GREENLOOP_BLOCKS_FOR"] = "AVX2" if wide else "AVX512"
    return int(pytest.main(["tests/test_native.py", "tests/test_rounded.py"]))


if __name__ == "__main__":
    sys.exit(main())
