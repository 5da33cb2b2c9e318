"""Losses of the fast paths beside those of torch, in runs of four steps, and what the committed result says."""

import json

import numpy as np
import pytest
import torch

from dit_fast import backend
from dit_fast.benchmarks import paths
from dit_fast.benchmarks.results import RESULTS
from dit_fast.errors import UserError
from dit_fast.world import single
from tests.helpers.no_gpu import no_gpu  # noqa: F401
from tests.helpers.toy_runs import make_shards


def test_sides_share_data_and_draws(tmp_path, monkeypatch):
    """Losses of all sides are one another's but for rounding; those of two seeds are not."""
    monkeypatch.setattr(paths, "STEPS", 4)
    monkeypatch.setattr(paths, "SETTINGS", (*paths.SETTINGS, "engine.global_batch=4"))
    monkeypatch.setattr(paths, "implementations", lambda device: {})  # the library may not have been built
    found = paths.measure(str(make_shards(tmp_path)), single(), lambda line: None)
    assert {kind: tuple(each) for kind, each in found["losses"].items()} == paths.TYPES
    for kind, limit in (("fp32", 1e-6), ("bf16", 1e-3)):
        *sides, seeds = found["apart"][kind].values()
        assert max(map(max, sides)) < limit < min(seeds) < 0.1
    assert paths.to_png(paths.figure(found["losses"], found["apart"])).startswith(b"\x89PNG")


def test_torch_is_not_compared_with_itself():
    with backend.force("torch"), pytest.raises(UserError, match=r"on cpu every op runs by torch.*make native"):
        paths.implementations(torch.device("cpu"))


def test_the_committed_result():
    """It is of whole runs, and what it says of the sides follows from its losses."""
    result = json.loads((RESULTS / "cpu" / "paths.json").read_text())
    assert result["implementations"]
    assert not result["dirty"]
    for kind, curves in result["losses"].items():
        assert np.shape(list(curves.values())) == (len(paths.TYPES[kind]), len(paths.SEEDS), paths.STEPS)
        for name, values in paths.apart(curves).items():
            np.testing.assert_allclose(result["apart"][kind][name], values, rtol=1e-5)
