"""Copies of shards go to a folder of each test."""

import pytest

from dit_fast.data import cache


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    folder = []

    def temporary():
        folder[:] = folder or [str(tmp_path_factory.mktemp("cache"))]
        return folder[0]

    monkeypatch.setattr(cache.tempfile, "gettempdir", temporary)
