"""The deterministic fill of methods.md §7.2: weights and inputs from a hash of their names, no download needed."""

import zlib

import numpy as np
import torch

from dit_fast.checkpoint import export_official, load_official
from dit_fast.models import Backbone, build_model
from dit_fast.nn.projector import projector

TINY = {"input_size": 8, "hidden_size": 64, "depth": 4, "num_heads": 4}


def fill(key: str, shape: tuple[int, ...], scale: float) -> torch.Tensor:
    index = np.arange(int(np.prod(shape)), dtype=np.uint64)
    hashed = (np.uint64(2654435761) * index + np.uint64(zlib.crc32(key.encode()))) % np.uint64(2**32)
    return torch.from_numpy(scale * (hashed.astype(np.float64) / 2**32 - 0.5)).reshape(shape)


def tiny_state(skip_wiring: str) -> dict[str, torch.Tensor]:
    """float64 state_dict of the tiny model, position embedding by formula."""
    model = build_model("SiT-S/2", **TINY, skip_wiring=skip_wiring)
    model.add_projector(projector(64, 32, 16))
    state = {}
    for key, value in export_official(model).items():
        filled = value.double() if key == "pos_embed" else fill(key, tuple(value.shape), 0.2)
        state[key] = filled + 1 if key.startswith("skip_norms.") and key.endswith("weight") else filled
    return state


def tiny_model(skip_wiring: str) -> Backbone:
    if skip_wiring == "off":
        return load_official(tiny_state("off"), "repa", num_heads=4)
    return load_official(tiny_state(skip_wiring), "diversedit", num_heads=4, skip_wiring=skip_wiring)
