"""A small AutoencoderKL in a folder, as diffusers saves it."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import pytest
import torch


def save_vae(folder, channels=12, levels=3, width=8, seed=0, **more):
    """Random weights, `levels` - 1 halvings of the image; returns the folder. Without diffusers, skips the test."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        diffusers.AutoencoderKL(
            block_out_channels=(width,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=channels,
            norm_num_groups=4,
            mid_block_add_attention=False,
            **{"scaling_factor": 1.0, **more},
        ).save_pretrained(folder)
    return Path(folder)


@functools.cache
def toy_vae():
    """One for the latents of `toy_runs.make_shards`, [12, 4, 4] of 16 pixels, until this process ends."""
    folder = tempfile.mkdtemp(prefix="toy-vae-")
    atexit.register(shutil.rmtree, folder, True)
    return save_vae(folder)
