"""Sample grids while training: the averaged weights, gathered from all ranks, draw the same images every time."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_fast import autoencoders
from dit_fast.autoencoders import Autoencoder
from dit_fast.checkpoint.run import LoadedRun, own_autoencoder
from dit_fast.data import LatentDataset
from dit_fast.diffusion import Guidance
from dit_fast.errors import ConfigError, DataError, UserError
from dit_fast.models import new_model
from dit_fast.models.base import GUIDANCE
from dit_fast.objectives import OBJECTIVES
from dit_fast.runs import TrainConfig
from dit_fast.sampling.grids import plain_grid, save_png
from dit_fast.sampling.images import sample_images
from dit_fast.sampling.options import SampleOptions, check_told
from dit_fast.train.engine import Engine
from dit_fast.train.guard import Diverged, Finiteness
from dit_fast.world import World

logger = logging.getLogger("dit_fast")


class Preview:
    """RUN/samples/step_N.png: image k has class k mod num_classes and starts from noise that depends on k alone.

    own: configuration of an autoencoder that the run trains (`Method.autoencoder`), which then decodes.
    Construction else loads the data set's on rank 0; UserError, on all ranks, where that cannot be done or no
    picture could be drawn with this configuration. Images that are not finite are not drawn: a warning says so, and
    training goes on.
    """

    def __init__(self, config: TrainConfig, dataset: LatentDataset, world: World, own: Mapping[str, Any] | None = None):
        self.config, self.dataset, self.world, self.own = config, dataset, world, own
        self._autoencoder: Autoencoder | None = None
        preview, classes = config.preview, tuple(range(dataset.info.num_classes))[: config.preview.count]
        try:
            self.options = SampleOptions(
                classes=classes,
                per_class=math.ceil(preview.count / len(classes)),
                sampler=preview.sampler,
                num_steps=preview.num_steps,
                cfg_scale=preview.cfg_scale,
                **{name: getattr(preview, name) for name in GUIDANCE},
                seed=config.run.seed,
                precision=config.engine.precision,
                chunk=preview.count,
            )
            check_told(getattr(config.model, "guidance_condition", False), {x: getattr(preview, x) for x in GUIDANCE})
        except UserError as error:
            raise ConfigError(f"preview: {error}") from None
        solvers = OBJECTIVES[config.objective.name].solvers
        if preview.sampler not in solvers:
            raise ConfigError(
                f"preview.sampler={preview.sampler} does not fit objective={config.objective.name}; set "
                f"preview.sampler={next(iter(solvers))} or preview.every=0"
            )
        if Guidance(preview.cfg_scale).needs_null and not config.model.label_dropout:
            raise ConfigError(
                f"preview.cfg_scale={preview.cfg_scale} needs a null label, and model.label_dropout=0 trains none; set "
                "preview.cfg_scale=1 or preview.every=0"
            )
        if own is None:
            world.agree(self._load)

    def _load(self) -> None:
        self._autoencoder = autoencoders.of(self.dataset)

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
            raise Diverged(f"{exception} is not finite after step {step}, so no preview was drawn", (step, step))
        if self.world.rank == 0:
            path = self.path(step)
            try:
                images = self._images(weights, step)
                save_png(plain_grid(images), path)
            except (OSError, DataError) as error:
                logger.warning("%s not written: %s; training goes on", path, error)

    def _images(self, weights: Mapping[str, Tensor], step: int) -> np.ndarray:
        # the new model's initial weights are thrown away; building it must not move the random numbers of the run
        with torch.random.fork_rng(devices=[]):
            model = new_model(self.config.model)
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        own = own_autoencoder(self.own, weights)
        run, alone = LoadedRun(model.eval(), self.config, {"step": step}, own), replace(self.world, rank=0, size=1)
        # its first chunk is the grid; the last images of the last round of classes are beyond it
        return next(sample_images(run, self.options, alone, self.dataset, self._autoencoder)).images
