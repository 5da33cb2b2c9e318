"""`make test` leaves out only what was proved as it stands: the record covers every source, and skips by name."""

import json
import subprocess
import sys

import pytest

from tests.ops import proofs
from tests.ops.proofs import FAMILIES, LOCK, ROOT


def test_every_file_of_kernels_is_covered():
    covered = set().union(*(proofs.sources(family) for family in FAMILIES))
    files = {path for path in (ROOT / "kernels").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert files <= covered, sorted(files - covered)
    for path in (ROOT / "dit_fast/ops").glob("*.py"):
        assert "dit_fast.kernels" not in path.read_text() or path in covered, path


def test_any_byte_of_a_source_changes_the_fingerprint():
    for family in FAMILIES:
        before = proofs.fingerprint(family)
        for changed in proofs.sources(family):
            edits = {changed: changed.read_bytes() + b" "}
            assert proofs.fingerprint(family, lambda path, e=edits: e.get(path) or path.read_bytes()) != before, changed
        edits = {LOCK: LOCK.read_bytes().replace(b'"registers": ', b'"registers": 1')}
        assert proofs.fingerprint(family, lambda path, e=edits: e.get(path) or path.read_bytes()) != before, LOCK


def test_sources_of_a_family_are_its_own():
    """What is not a family's does not repeat its proofs; a change of shared code repeats those that use it."""
    by_name = {family: {path.name for path in proofs.sources(family)} for family in FAMILIES}
    assert {"qk_norm.py", "rows.py", "ordered_sum.py", "test_qk_norm_kernels.py"} <= by_name["qk_norm"]
    assert not {"gelu.py", "gelu_mlp.py", "adaln.py", "flow.py"} & by_name["qk_norm"]
    assert not {"loop.py", "recipes.py", "toy_runs.py"} & by_name["gelu"]  # what fixtures of whole runs import
    assert {"adaln_rows.py", "adaln_cpp.py", "test_interpreter.py", "aot.py", "conftest.py"} <= by_name["adaln"]
    assert {"diversity_sums.py", "test_diversity_native.py", "golden.py"} <= by_name["diversity"]
    assert {"test_long_skip_op.py", "long_skip_tiles.py", "row_statistics.py"} <= by_name["long_skip"]


@pytest.mark.parametrize("proved", [True, False])
def test_only_what_was_proved_is_skipped(tmp_path, monkeypatch, proved):
    record = {family: proofs.fingerprint(family) for family in FAMILIES}
    if not proved:
        record["gelu"] = "0" * 64
    monkeypatch.setattr(proofs, "RECORD", tmp_path / "proved.json")
    monkeypatch.delenv("PROVE", raising=False)
    assert proofs.changed() == FAMILIES  # no record yet
    proofs.RECORD.write_text(json.dumps(record))
    assert proofs.changed() == ([] if proved else ["gelu"])
    if proved:
        with pytest.raises(pytest.skip.Exception, match=r"gelu kernels: .*`make test-kernels` runs it"):
            proofs.skip_if_proved("gelu")
    else:
        proofs.skip_if_proved("gelu")
    monkeypatch.setenv("PROVE", "all")
    proofs.skip_if_proved("adaln")


def test_the_record_is_written_by_the_command(tmp_path):
    code = "import pathlib, sys; from tests.ops import proofs; proofs.RECORD = pathlib.Path(sys.argv[2]); proofs.main()"
    command = [sys.executable, "-c", code, "--record", str(tmp_path / "proved.json")]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    assert json.loads((tmp_path / "proved.json").read_text()) == {f: proofs.fingerprint(f) for f in FAMILIES}
