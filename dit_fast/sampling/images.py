"""`sample_images`: the one iterator of images from weights; keyed noise, guidance, the data set's own decoder."""

from collections.abc import Container, Iterator

import torch

from dit_fast import autoencoders
from dit_fast.autoencoders import Autoencoder
from dit_fast.autoencoders.pixels import decode_images
from dit_fast.checkpoint.run import LoadedRun
from dit_fast.data import LatentDataset
from dit_fast.diffusion import initial_noise, sample
from dit_fast.sampling.options import SampleOptions
from dit_fast.sampling.samples import Samples
from dit_fast.tree import image
from dit_fast.world import World


def sample_images(
    run: LoadedRun,
    options: SampleOptions,
    world: World,
    dataset: LatentDataset | None = None,
    autoencoder: Autoencoder | None = None,
    done: Container[int] = (),
) -> Iterator[Samples]:
    """This rank's images, chunk by chunk: every `world.size`-th chunk of options.chunk images from the rank's own on.

    Image k depends on the seed, on k and on its class, not on how many are drawn or on the number of ranks; equal
    `chunk` gives equal bytes. A chunk is held at a time, and ranks do not talk. run: read with options.weights.
    dataset, autoencoder: the run's, where they are open already; one that the run has trained comes first. done: first
    images of chunks that are not wanted.

    Raises UserError, here, for a label outside the data set's classes and for a data set or an autoencoder that cannot
    be read; while drawing, for guidance of a model without a null label, and for images that are not finite, naming the
    first.
    """
    dataset = run.dataset() if dataset is None else dataset
    options = options.resolved(run, dataset)
    own = run.autoencoder
    decoder = (own or autoencoder or autoencoders.of(dataset)).to(world.device)
    model, device, classes = run.model.to(world.device), world.device, options.classes
    objective = run.objective
    shapes = model.shapes if len(model.shapes) > 1 else model.shapes["image"]

    def draw(first: int) -> Samples:
        index = torch.arange(first, min(first + options.chunk, options.count), dtype=torch.int64, device=device)
        labels = torch.tensor(classes, dtype=torch.int64, device=device)[index % len(classes)]
        noise = initial_noise(options.seed, index, shapes)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            latents = sample(
                model,
                noise,
                options.conditions(labels),
                index=index,
                path=objective.path,
                prediction=objective.prediction,
                field=objective.field,
                **options.arguments(),
            )
        pictures = decode_images(image(latents), own or dataset.info, decoder, f"weights of step {run.step}", first)
        return Samples(pictures, labels.cpu().numpy(), run.step, options.text(), first)

    firsts = range(world.rank * options.chunk, options.count, world.size * options.chunk)
    return (draw(first) for first in firsts if first not in done)
