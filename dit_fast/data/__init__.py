"""Latent shards: format, order, readers, building. Names are loaded when first asked for, so importing stays light."""

import importlib
from typing import Any

_HOME = {
    "LatentDataset": "dataset",
    "DatasetInfo": "description",
    "open_dataset": "dataset",
    "verify_dataset": "verify",
    "rebuild_index": "verify",
    "Plan": "plan",
    "build_loader": "loader",
    "load_autoencoder": "autoencoders",
    "Autoencoder": "autoencoders",
    "PatchPCA": "patch_pca",
    "build_shards": "build",
    "import_vae_sd": "vae_sd",
    "load_encoder": "encoders",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dit_fast.data' has no attribute '{name}'")
    return getattr(importlib.import_module(f"dit_fast.data.{_HOME[name]}"), name)
