"""Scripts in a process of their own, under one version of Triton that compiles instead of interpreting."""

import os
import subprocess
import sys

from tests.ops.install_triton import ROOT, folder


def run_compiling(script: str, version: str) -> None:
    """Raises AssertionError with the end of what it wrote where the script fails."""
    environment = os.environ | {"PYTHONPATH": str(folder(version))}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
