"""`dit-fast export ops FOLDER`, as Hugging Face's `kernels` loads it: beside dit_fast, and where there is none."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from dit_fast.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("kernels") / "ops"
    assert main(["export", "ops", str(out)]) == 0
    return out


def test_ops_and_layers_through_the_library(folder, tmp_path):
    try:
        version("kernels")
    except PackageNotFoundError:
        pytest.skip("kernels is not installed")
    script = shutil.copy(Path(__file__).with_name("kernel_user.py"), tmp_path / "user.py")
    done = subprocess.run([sys.executable, script, str(folder)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_nothing_of_ours_is_needed(folder, tmp_path):
    package = folder / "build" / "torch-universal"
    code = f"""
import importlib.util, sys
sys.modules["dit_fast"] = None
spec = importlib.util.spec_from_file_location("made_up", {str(package / "__init__.py")!r})
module = importlib.util.module_from_spec(spec); sys.modules["made_up"] = module; spec.loader.exec_module(module)
import torch
x = torch.randn(2, 5, 8, requires_grad=True)
module.diversity_loss([x, x * 2, x + 1]).total.backward()
assert not [name for name in sys.modules if name.startswith("dit_fast.")]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_folder_with_something_in_it_is_left_alone(folder, capsys):
    assert main(["export", "ops", str(folder)]) == 2
    assert "exists already; name a new folder" in capsys.readouterr().err


def test_what_is_for_runs_alone_is_refused(tmp_path, capsys):
    assert main(["export", "ops", str(tmp_path / "new"), "--weights", "model"]) == 2
    assert "--family, --data and --weights are for runs" in capsys.readouterr().err
    assert main(["export", "ops", str(tmp_path / "ops.pt")]) == 2
    assert "ops.pt: the ops are a folder, not a file of weights; name another OUT" in capsys.readouterr().err
