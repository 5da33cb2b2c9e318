"""Reading a run back where its own description is damaged or from elsewhere."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dit_fast.checkpoint import run
from dit_fast.errors import CheckpointError


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"step": 3}, "must be a group of keys"),
        ({"step": 3, "config": [1]}, "must be a group of keys"),
        ({"step": 3, "config": {"model": {"nmae": "SiT-XL/2"}}}, "did you mean"),
        ({"step": 3, "config": {"model": {"name": "SiT-Huge/2"}}}, "SiT-Huge/2"),
        ({"step": 3, "config": {"model": {"name": "SiT-Nano/2", "num_classes": "ten"}}}, "ten"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named_with_its_file(monkeypatch, state, reason):
    monkeypatch.setattr(run, "find_checkpoint", lambda path, files: SimpleNamespace(path=Path(path), state=state))
    with pytest.raises(CheckpointError, match=rf"^a/step_3/state\.json: .*{reason}") as caught:
        run.load_run("a/step_3")
    assert "\n" not in str(caught.value)
