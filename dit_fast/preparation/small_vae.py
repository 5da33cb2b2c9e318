"""A small AutoencoderKL trained briefly on a set of images, where no released one is at hand: for trying REPA-E.

    python -m dit_fast.preparation.small_vae SOURCE OUT --size 32 [--steps 300] [--channels 12] [--halvings 2]

OUT is then a folder for `diffusers:OUT`. Minutes on a CPU core; its pictures are blurred.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_fast import terminal
from dit_fast.autoencoders.patch_pca import to_float
from dit_fast.errors import ConfigError, DataError
from dit_fast.preparation.build import order_of, read_image
from dit_fast.preparation.sources import open_source

KL_WEIGHT = 1e-6  # of the KL divergence, summed over a latent, beside the mean absolute error
GROUPS = 8  # of its group norms


def train_small_vae(
    images: np.ndarray,
    folder: str | Path,
    *,
    channels: int = 12,
    halvings: int = 2,
    width: int = 32,
    steps: int = 300,
    batch: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
) -> Path:
    """Trains one on uint8 [N, S, S, 3] and writes it to `folder`, with mean and deviation of its latents per channel.

    channels: of a latent, which has S / 2^halvings values a side. width: of all convolutions. steps: of AdamW on
    `batch` images drawn with `seed`; the rate falls linearly to 0. Raises ConfigError for a number that is out of range
    or does not divide, DataError where diffusers is missing.
    """
    if min(channels, steps, batch) < 1 or halvings < 0 or width < 1 or width % GROUPS:
        raise ConfigError(
            f"channels={channels}, steps={steps}, batch={batch}, halvings={halvings}, width={width}: at least 1, and a "
            f"width that {GROUPS} divides"
        )
    if images.shape[1] % 2**halvings:
        raise ConfigError(f"size={images.shape[1]} is not a multiple of {2**halvings}; change --size or --halvings")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _new(channels, halvings, width)
        optimizer = torch.optim.AdamW(module.parameters(), lr, weight_decay=0.0)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            chosen = torch.randint(len(images), (batch,)).numpy()
            pictures = to_float(images[chosen])
            posterior = module.encode(pictures).latent_dist
            error = (module.decode(posterior.sample()).sample - pictures).abs().mean()
            optimizer.zero_grad()
            (error + KL_WEIGHT * posterior.kl().mean()).backward()
            optimizer.step()
        mean, std = _statistics(module, images)
    module.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    module.save_pretrained(str(folder))
    return Path(folder)


def _new(channels: int, halvings: int, width: int) -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise DataError("an AutoencoderKL needs diffusers; run `pip install 'dit_fast[diffusers]'`") from None
    levels = halvings + 1
    return AutoencoderKL(
        block_out_channels=(width,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=channels,
        norm_num_groups=GROUPS,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def _statistics(module: Any, images: np.ndarray, count: int = 512) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel of latents drawn for the first images."""
    parts = [to_float(images[first : first + 64]) for first in range(0, min(count, len(images)), 64)]
    latents = torch.cat([module.encode(part).latent_dist.sample() for part in parts]).double()
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3))


def main(arguments: list[str] | None = None) -> int:
    return terminal.run(_work, arguments)


def _work(arguments: list[str]) -> int:
    parser = terminal.Parser(prog="python -m dit_fast.preparation.small_vae", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder with one folder of images per class, or .npz with images and labels")
    parser.add_argument("out", help="folder for the autoencoder")
    parser.add_argument("--size", type=int, required=True, help="pixels of the square centre crop")
    parser.add_argument("--count", type=int, default=10_000, help="images that are read, in the order of the shards")
    for name, default in (("channels", 12), ("halvings", 2), ("width", 32), ("steps", 300), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    options: argparse.Namespace = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in ("channels", "halvings", "width", "steps", "seed")}
    print(train_small_vae(read_images(options.source, options.size, options.count), options.out, **given))
    return 0


def read_images(source: str | Path, size: int, count: int) -> np.ndarray:
    """The first images of a source in the order of its shards, uint8 [N, size, size, 3]."""
    opened = open_source(source)
    order = order_of(len(opened.labels), shuffle=True)[:count]
    return np.stack([read_image(opened, int(number), size) for number in order])


if __name__ == "__main__":
    sys.exit(main())
