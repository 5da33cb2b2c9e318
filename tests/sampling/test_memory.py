"""Sampling holds one chunk at a time, however many images are drawn."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dit_fast.benchmarks.results import RESULTS
from tests.helpers.recording import recording
from tests.helpers.toy_runs import environment

ENDINGS = (".npz", ".tar", "")

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


@pytest.fixture(scope="module")
def record():
    with recording("sampling_memory", [f"MB to {ending or 'a folder'}" for ending in ENDINGS]) as values:
        yield values


@pytest.mark.long
@pytest.mark.parametrize("ending", ENDINGS)
def test_memory_does_not_grow_with_the_number_of_images(place, tmp_path, record, ending):
    """The 18,000 further images are 55 MB."""
    peaks = []
    for count in ("2000", "20000"):
        out = tmp_path / f"{count}{ending}"
        command = [sys.executable, "-c", SCRIPT, str(place / "plain"), count, str(out)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
        status, kilobytes = done.stdout.splitlines()[-1].split()
        assert status == "0", done.stderr
        peaks.append(int(kilobytes) / 1024)
    assert peaks[1] - peaks[0] < 15
    record[f"MB to {ending or 'a folder'}"] = {"2000 images": round(peaks[0], 1), "20000 images": round(peaks[1], 1)}


def test_the_documented_peaks_are_the_recorded_ones():
    values = json.loads((RESULTS / "cpu" / "sampling_memory.json").read_text())["values"]
    words = [f"{few:.0f} and {many:.0f} {where}" for where, (few, many) in ((k, v.values()) for k, v in values.items())]
    assert ", ".join(words) in " ".join((Path(__file__).parents[2] / "docs" / "sampling.md").read_text().split())
