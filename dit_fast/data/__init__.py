"""Latent shards: format, order, writers, readers. Names are loaded when first asked for, so importing stays light."""

import importlib
from typing import Any

_HOME = {
    "LatentDataset": "dataset",
    "DatasetInfo": "description",
    "open_dataset": "dataset",
    "open_together": "dataset",
    "ShardCache": "cache",
    "Plan": "plan",
    "build_loader": "loader",
    "add_field": "added",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dit_fast.data' has no attribute '{name}'")
    return getattr(importlib.import_module(f"dit_fast.data.{_HOME[name]}"), name)
