"""A Triton in the checkout that another Python put there is replaced: its extension module serves that one alone."""

import subprocess
import sys
from pathlib import Path

from tests.ops import install_triton


def test_a_build_for_another_python_is_replaced_and_ones_own_is_kept(tmp_path, monkeypatch):
    own = f"cp{sys.version_info.major}{sys.version_info.minor}"
    installs = []

    def lay(target: Path, python: str) -> None:
        (target / "triton").mkdir(parents=True)
        (wheel := target / "triton-3.9.0.dist-info").mkdir()
        (wheel / "WHEEL").write_text(f"Tag: {python}-{python}-manylinux_2_28_x86_64\n")

    def pip(command, **_):
        installs.append(command[-1])
        lay(Path(command[command.index("--target") + 1]), own)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(install_triton, "ROOT", tmp_path)
    monkeypatch.setattr(install_triton.subprocess, "run", pip)
    lay(tmp_path / ".cache/triton-3.9.0", "cp39")
    assert install_triton.folder("3.9.0") == install_triton.folder("3.9.0") == tmp_path / ".cache/triton-3.9.0"
    assert installs == ["triton==3.9.0"]
    assert own in (tmp_path / ".cache/triton-3.9.0/triton-3.9.0.dist-info/WHEEL").read_text()
    assert [path.name for path in (tmp_path / ".cache").iterdir()] == ["triton-3.9.0"]
