"""Freed memory meets no page fault when it is taken again."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
from dit_fast.train.allocator import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        blocks = [bytearray(4 << 20) for _ in range(6)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert faults() > 8 * 1024
assert keep_memory()
faults()
assert faults() < 1024
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_freed_memory_is_kept():
    subprocess.run([sys.executable, "-c", FAULTS], check=True, timeout=60)
