"""Sample grids while training: the averaged weights, gathered from all ranks, draw the same images every time."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dit_fast import autoencoders
from dit_fast.autoencoders import Autoencoder
from dit_fast.autoencoders.pixels import decode_images
from dit_fast.data import LatentDataset
from dit_fast.diffusion import Guidance, initial_noise, sample
from dit_fast.diffusion.samplers import check_options
from dit_fast.errors import ConfigError, DataError
from dit_fast.models import new_model
from dit_fast.runs import TrainConfig
from dit_fast.train.engine import Engine
from dit_fast.train.guard import Diverged, Finiteness
from dit_fast.tree import image
from dit_fast.world import World

logger = logging.getLogger("dit_fast")

SMALLEST = 64  # pixels; smaller images are enlarged by a whole factor


class Preview:
    """RUN/samples/step_N.png: image k has class k mod num_classes and starts from noise that depends on k alone.

    Construction loads the data set's autoencoder on rank 0; UserError, on all ranks, where that cannot be done or no
    picture could be drawn with this configuration. Images that are not finite are not drawn: a warning says so, and
    training goes on.
    """

    def __init__(self, config: TrainConfig, dataset: LatentDataset, world: World):
        self.config, self.info, self.world = config, dataset.info, world
        self._autoencoder: Autoencoder | None = None
        preview = config.preview
        check_options(preview.sampler, preview.num_steps, preview.count, config.run.seed)
        if Guidance(preview.cfg_scale).needs_null and not config.model.label_dropout:
            raise ConfigError(
                f"preview.cfg_scale={preview.cfg_scale} needs a null label, and model.label_dropout=0 trains none; set "
                "preview.cfg_scale=1 or preview.every=0"
            )
        world.agree(lambda: self._load(dataset))

    def _load(self, dataset: LatentDataset) -> None:
        self._autoencoder = autoencoders.of(dataset)

    def path(self, step: int) -> Path:
        return Path(self.config.run.dir) / "samples" / f"step_{step:08d}.png"

    def draw(self, engine: Engine, untrained: Mapping[str, Tensor], step: int) -> None:
        """Collective: all ranks gather, rank 0 samples and writes. Raises Diverged, on all, for averages with NaN."""
        weights: dict[str, Tensor] = dict(untrained)
        finite = Finiteness(self.world)
        for name, tensor in engine.full_state("ema"):
            finite.look(f"ema of '{name}'", tensor)
            if self.world.rank == 0:
                weights[name] = tensor.cpu().clone()
        if (exception := finite.first_exception()) is not None:
            raise Diverged(f"{exception} is not finite after step {step}, so no preview was drawn")
        if self.world.rank == 0:
            path = self.path(step)
            try:
                images = self._images(weights, step)
                path.parent.mkdir(exist_ok=True)
                write_grid(images, path)
            except (OSError, DataError) as error:
                logger.warning("%s not written: %s; training goes on", path, error)

    def _images(self, weights: Mapping[str, Tensor], step: int) -> np.ndarray:
        config, device = self.config, self.world.device
        # the new model's initial weights are thrown away; building it must not move the random numbers of the run
        with torch.random.fork_rng(devices=[]):
            model = new_model(config.model)
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        model.to(device).eval()
        index = torch.arange(config.preview.count, dtype=torch.int64, device=device)
        noise = initial_noise(config.run.seed, index, model.shapes["image"])
        with torch.autocast(device.type, torch.bfloat16, enabled=config.engine.precision == "bf16"):
            latents = sample(
                model,
                noise,
                index % self.info.num_classes,
                sampler=config.preview.sampler,
                num_steps=config.preview.num_steps,
                cfg_scale=config.preview.cfg_scale,
                seed=config.run.seed,
                index=index,
                path=config.flow.path,
                chunk=config.preview.count,
            )
        assert self._autoencoder is not None
        autoencoder, origin = self._autoencoder.to(device), f"averaged weights of step {step}"
        return decode_images(image(latents), self.info, autoencoder, config.preview.count, origin)


def write_grid(images: np.ndarray, path: Path) -> None:
    """uint8 [N, H, W, 3] as one PNG, row by row, about as wide as high; written whole or not at all."""
    from PIL import Image

    count, height, width = images.shape[:3]
    columns = int(np.ceil(count**0.5))
    rows = -(-count // columns)
    sheet = np.full((rows, columns, height, width, 3), 255, np.uint8)
    sheet.reshape(rows * columns, height, width, 3)[:count] = images
    picture = Image.fromarray(sheet.swapaxes(1, 2).reshape(rows * height, columns * width, 3))
    factor = max(SMALLEST // max(height, width), 1)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    partial = path.with_name(f".{path.stem}.partial.png")
    try:
        picture.save(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
