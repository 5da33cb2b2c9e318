"""Sampling holds one chunk at a time, however many images are drawn."""

import subprocess
import sys

import pytest

from tests.helpers.toy_runs import environment

SCRIPT = """
import re, sys
from pathlib import Path
from dit_fast.cli import main
from dit_fast.sampling.images import Drawing

Drawing.latents = lambda self, noise, labels, index, field=None: noise  # a model that takes no time
fixed = ["--batch", "100", "--labels", "random"]
status = main(["sample", sys.argv[1], *fixed, "--count", sys.argv[2], "-o", sys.argv[3]])
# getrusage would tell the peak of the process that started this one, if that is higher
print(status, re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.long
@pytest.mark.parametrize("ending", [".npz", ".tar", ""])
def test_memory_does_not_grow_with_the_number_of_images(place, tmp_path, ending):
    """The 18,000 further images are 55 MB."""
    peaks = []
    for count in ("2000", "20000"):
        out = tmp_path / f"{count}{ending}"
        command = [sys.executable, "-c", SCRIPT, str(place / "plain"), count, str(out)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
        status, kilobytes = done.stdout.splitlines()[-1].split()
        assert status == "0", done.stderr
        peaks.append(int(kilobytes) / 1024)
    print(f"peak {peaks[0]:.1f} MB with 2,000 images, {peaks[1]:.1f} MB with 20,000")
    assert peaks[1] - peaks[0] < 15
