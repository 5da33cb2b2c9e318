"""`sample_images`: the one iterator of images from weights; keyed noise, guidance, the data set's own decoder."""

from collections.abc import Callable, Container, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_fast import autoencoders
from dit_fast.autoencoders import Autoencoder, load_autoencoder
from dit_fast.autoencoders.pixels import DECODED, Scaled, decode_images, from_model_space
from dit_fast.checkpoint.run import LoadedRun
from dit_fast.data import LatentDataset
from dit_fast.diffusion import Guidance, initial_noise, sample
from dit_fast.diffusion.solvers import Field
from dit_fast.errors import UserError
from dit_fast.sampling.options import SampleOptions
from dit_fast.sampling.samples import Samples
from dit_fast.tree import Tree, image
from dit_fast.world import World


def sample_images(
    run: LoadedRun,
    options: SampleOptions,
    world: World,
    dataset: LatentDataset | None = None,
    autoencoder: Autoencoder | None = None,
    done: Container[int] = (),
    latents: bool = False,
) -> Iterator[Samples]:
    """This rank's images, chunk by chunk: every `world.size`-th chunk of options.chunk images from the rank's own on.

    Image k depends on the seed, on k and on its class, not on how many are drawn or on the number of ranks; equal
    `chunk` gives equal bytes. A chunk is held at a time, and ranks do not talk. run: read with options.weights.
    dataset, autoencoder: the run's, where they are open already; one that the run has trained comes first. done: first
    images of chunks that are not wanted. latents: unscaled latents in the place of pictures; no autoencoder is needed.

    Raises UserError, here, for a label outside the data set's classes and for a data set or an autoencoder that cannot
    be read; while drawing, for guidance of a model without a null label, and for images that are not finite, naming the
    first.
    """
    dataset = run.dataset() if dataset is None else dataset
    options = options.resolved(run, dataset)
    drawing = Drawing(run, options, world.device, dataset, autoencoder, latents)

    def draw(first: int) -> Samples:
        index = torch.arange(first, min(first + options.chunk, options.total), dtype=torch.int64, device=world.device)
        labels = options.labels_of(index)
        drawn = drawing.latents(drawing.noise(index), labels, index)
        pictures = drawing.unscaled(drawn) if latents else drawing.pictures(drawn, first)
        return Samples(pictures, labels.cpu().numpy(), run.step, options.text(), first)

    firsts = range(world.rank * options.chunk, options.total, world.size * options.chunk)
    return (draw(first) for first in firsts if first not in done)


class Drawing:
    """From noise to pictures by a run's weights and resolved options, on one device; arguments as `sample_images`.

    autoencoder: None where only latents are wanted.
    """

    def __init__(
        self,
        run: LoadedRun,
        options: SampleOptions,
        device: torch.device,
        dataset: LatentDataset,
        autoencoder: Autoencoder | None = None,
        latents: bool = False,
    ):
        self.run, self.options, self.device = run, options, device
        self.autoencoder = None if latents else (autoencoder or decoder(run, options, dataset)).to(device)
        self.scaled: Scaled = run.autoencoder or dataset.info
        self.model, self.objective = run.model.to(device), run.objective

    def noise(self, index: Tensor, seed: int | None = None) -> Tree:
        """What images of these numbers (int64 [N]) begin with, of the options' seed or another."""
        shapes = self.model.shapes if len(self.model.shapes) > 1 else self.model.shapes["image"]
        return initial_noise(self.options.seed if seed is None else seed, index, shapes)

    def latents(
        self, noise: Tree, labels: Tensor, index: Tensor, field: Callable[[Any, Any, Guidance], Field] | None = None
    ) -> Tensor:
        """Model-space latents [N, C, h, w] of labels [N]. index: of the images, for the noise of an SDE's steps.

        field: in the place of the objective's.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            found = sample(
                self.model,
                noise,
                self.options.conditions(labels),
                index=index,
                path=self.objective.path,
                prediction=self.objective.prediction,
                field=field or self.objective.field,
                **self.options.arguments(),
            )
        return image(found)

    def pictures(self, latents: Tensor, first: int = 0) -> np.ndarray:
        """uint8 [N, H, W, 3]. first: number of the first, for messages."""
        if self.autoencoder is None:
            raise RuntimeError("a drawing of latents has no autoencoder")
        origin, batch = f"weights of step {self.run.step}", min(self.options.chunk, DECODED)
        return decode_images(latents, self.scaled, self.autoencoder, origin, first, batch)

    def unscaled(self, latents: Tensor) -> np.ndarray:
        """float32 [N, C, h, w], as an autoencoder takes them."""
        return from_model_space(latents, self.scaled).float().cpu().numpy()


def decoder(run: LoadedRun, options: SampleOptions, dataset: LatentDataset) -> Autoencoder:
    """What turns the run's latents into images: the autoencoder that the run trained, else that of the options, else
    the data set's. Raises UserError where none is known, and for one that does not fit.
    """
    if options.autoencoder is None:
        return run.autoencoder or autoencoders.of(dataset)
    if run.autoencoder is not None:
        raise UserError("the run has an autoencoder of its own, whose latents no other decodes; drop autoencoder")
    found, channels = load_autoencoder(options.autoencoder), run.model.shapes["image"][0]
    if found.channels != channels:
        raise UserError(
            f"{options.autoencoder}: decodes latents of {found.channels} channels, and the run's have {channels}; give "
            "the one that made them"
        )
    return found
