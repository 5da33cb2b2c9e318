"""The benchmark of readers: what it measures can be had, and the page shows what was recorded."""

import itertools
import json

import pytest
import torch

from dit_fast.benchmarks import loading, loading_sides
from dit_fast.benchmarks.results import RESULTS, ROOT
from dit_fast.data import open_dataset
from dit_fast.data.dataset import CHECKED_FIRST


def test_a_large_data_set_opens_with_as_many_indexes_as_a_small_one(tmp_path):
    for samples, indexes in ((3000, 3), (70_500, CHECKED_FIRST)):
        loading.stub(tmp_path / str(samples), samples)
        assert len(open_dataset(tmp_path / str(samples))) == samples
        assert loading.opened(str(tmp_path / str(samples)))["indexes"] == indexes


def test_all_sides_give_the_same_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(loading_sides, "SAMPLES", 64)
    monkeypatch.setattr(loading_sides, "PER_SHARD", 32)
    shards, arrays = loading_sides.make(tmp_path)
    sides = {"ours": loading_sides.ours(shards, 0), "npy": loading_sides.npy(arrays, 0)}
    pytest.importorskip("webdataset")
    sides["webdataset"] = loading_sides.webdataset(shards, 0)
    for name, side in sides.items():
        for batch in itertools.islice(side, 3):
            moments, label = (batch["moments"], batch["label"]) if name == "ours" else batch
            assert moments.shape == (loading_sides.MICRO, *loading_sides.SHAPE)
            assert moments.dtype == torch.float32
            assert (moments >= 0).all()
            assert not torch.as_tensor(label).any()


def test_the_page_shows_the_record():
    result = json.loads((RESULTS / "cpu" / "loading.json").read_text())
    table = loading.tables(result)
    assert table in (ROOT / "docs" / "benchmarks.md").read_text()
    ours = {row["workers"]: row for row in result["readers"] if row["reader"] == "ours"}
    for workers in (0, 1):
        assert min(ours[workers]["over_webdataset"], ours[workers]["over_npy"]) >= result["goal"]
    assert all(len(row["rounds"]) > 2 for row in result["readers"])
    assert [row["indexes"] for row in result["opening"]] == [CHECKED_FIRST] * len(loading.SIZES)
