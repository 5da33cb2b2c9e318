"""Install the Triton versions that the kernels are proved on, each in a folder of its own: .cache/triton-<version>.

They cannot share an environment with each other, and 3.6.0's interpreter needs numpy < 2.4. Put a folder first on
PYTHONPATH to use it. 3.8.0 is the one that ttsem executes (semantics.py); ttsem asks for Python 3.12, but runs on 3.11.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSIONS = {"3.6.0": ["numpy<2.4"], "3.9.0": []}  # that of the GPU machines, and a current one
EXECUTED = "3.8.0"
_BESIDE = VERSIONS | {EXECUTED: ["ttsem==0.1.0", "--ignore-requires-python"]}


def folder(version: str) -> Path:
    """Where a version lies; installs it if it is absent. Raises CalledProcessError if pip cannot; a test that is no
    proof to be made (PROVE) is skipped then outside of CI, as on a GPU machine without a network."""
    target = ROOT / ".cache" / f"triton-{version}"
    if not _serves(target):
        # Under another name until complete, so that an interrupted install is not taken for a version.
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(partial)]
        done = subprocess.run([*command, f"triton=={version}", *_BESIDE[version]])
        if done.returncode and "PYTEST_CURRENT_TEST" in os.environ and not {"CI", "PROVE"} & os.environ.keys():
            import pytest

            pytest.skip(f"pip cannot install triton=={version}; put it into {target}")
        done.check_returncode()
        if target.is_dir() and not _serves(target):
            shutil.rmtree(target, ignore_errors=True)  # by another Python, or by another process right now
        try:
            partial.rename(target)
        except OSError:  # another test process was faster; a folder that is there and not empty is whole
            if not _serves(target):
                raise
            shutil.rmtree(partial)
    return target


def _serves(target: Path) -> bool:
    """Whether Triton lies there, built for the running Python: an extension module serves no other."""
    tag = f"-cp{sys.version_info.major}{sys.version_info.minor}-"
    return any(tag in wheel.read_text() for wheel in target.glob("triton-*.dist-info/WHEEL"))


if __name__ == "__main__":
    for name in _BESIDE:
        print(folder(name))
