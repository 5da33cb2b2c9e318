"""From a run, or from images in files, to numbers with their protocol; shared by ranks, and going on after a kill."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dit_fast.autoencoders import Autoencoder
from dit_fast.checkpoint.run import LoadedRun
from dit_fast.data import LatentDataset, open_dataset
from dit_fast.diffusion import SOLVERS
from dit_fast.errors import UserError
from dit_fast.evaluation.features import CHUNK, FeatureParts, Reference, ReferenceSource, extract, is_statistics
from dit_fast.evaluation.measure import described, measure, possible, rows_needed
from dit_fast.evaluation.networks import Network, in_batches
from dit_fast.evaluation.records import Evaluation, Protocol
from dit_fast.evaluation.sources import ImageSet, ShardImages, is_shards, open_images
from dit_fast.sampling.images import sample_images
from dit_fast.sampling.options import SampleOptions
from dit_fast.world import World

FOLDER = "evaluation"  # in a run folder: statistics of references, and parts of what is going on
Step = Callable[[int], object]


@dataclass(frozen=True)
class Evaluator:
    """What does not change from one set of images to the next. metrics: of `measure.METRICS`. folder: for files."""

    network: Network
    reference: Reference | None  # of rank 0 alone
    metrics: tuple[str, ...]
    folder: Path
    world: World

    def of_images(self, images: ImageSet, at: int | None = None, step: Step = lambda images: None) -> Evaluation | None:
        """Of images from files, on rank 0; None on the others. at: the step of the weights that drew them, if known."""
        parts = self.parts_of_images(images)
        extract(images, self.network, parts, self.world, step)
        if self.world.rank:
            return None
        return self.evaluation(parts, at, images.size, labels=images.labels, samples=images.name)

    def parts_of(
        self, run: LoadedRun, options: SampleOptions, dataset: LatentDataset, autoencoder: Autoencoder
    ) -> FeatureParts:
        """Where the features of a run's images go."""
        weights = run.state.get("weights_sha256", f"in memory, step {run.step}")
        content = [asdict(options), weights, dataset.info.fingerprint, autoencoder.identity, self.network.identity]
        return FeatureParts(self.folder / "parts", content, options.total, options.chunk)

    def parts_of_images(self, images: ImageSet) -> FeatureParts:
        """Where the features of images from files go."""
        return FeatureParts(self.folder / "parts", [images.identity, self.network.identity], images.count, CHUNK)

    def _resizing(self, size: tuple[int, int], other: tuple[int, int] | None) -> str:
        """Of the images, and of those of the reference where that is another."""
        own, its = self.network.resizing(size), None if other is None else self.network.resizing(other)
        return own if its in (own, None) else f"{own} (the reference: {its})"

    def evaluation(self, parts: FeatureParts, step: int | None, size: tuple[int, int], **how: Any) -> Evaluation:
        """The numbers of features that are all there, with their protocol, of which `how` tells the drawing; rank 0."""
        reference = self.reference
        assert reference is not None, "rank 0 has read it"
        values = measure(parts.gather(rows_needed(self.metrics)), reference, self.network, self.metrics)
        protocol = Protocol(
            network=self.network.title,
            network_identity=self.network.identity,
            resizing=self._resizing(size, reference.size),
            metrics=described(self.metrics, reference, self.network),
            reference=reference.name,
            reference_identity=reference.identity,
            reference_count=reference.features.count,
            reference_size=None if reference.size is None else "{}x{}".format(*reference.size),
            count=parts.total,
            size=f"{size[0]}x{size[1]}",
            **how,
        )
        return Evaluation(step=step, values=values, protocol=protocol)


def of_run(
    evaluators: Sequence[Evaluator],
    run: LoadedRun,
    options: SampleOptions,
    dataset: LatentDataset,
    autoencoder: Autoencoder,
    step: Step = lambda images: None,
) -> list[Evaluation]:
    """One evaluation for each, of the same images, which the run draws now; on rank 0, [] on the others.

    options: resolved. autoencoder: decodes. Raises UserError as `sample_images` does.
    """
    draw_features(evaluators, run, options, dataset, autoencoder, step)
    return [] if evaluators[0].world.rank else conclude(evaluators, run, options, dataset, autoencoder)


def draw_features(
    evaluators: Sequence[Evaluator],
    run: LoadedRun,
    options: SampleOptions,
    dataset: LatentDataset,
    autoencoder: Autoencoder,
    step: Step = lambda images: None,
) -> None:
    """This rank's share of the images, as features on the disk."""
    every = [each.parts_of(run, options, dataset, autoencoder) for each in evaluators]
    there = [parts.done() for parts in every]
    done = set.intersection(*there)
    step(sum(min(options.chunk, options.total - first) for first in done))
    drawn = sample_images(run, options, evaluators[0].world, dataset, autoencoder, done)
    with counted(run.model) as calls:
        for samples in drawn:
            images, count = torch.from_numpy(samples.images), len(samples.images)
            nfe = calls() / (count if SOLVERS[str(options.sampler)].adaptive else 1)
            for each, parts, have in zip(evaluators, every, there, strict=True):
                if samples.first not in have:
                    parts.add(samples.first, in_batches(each.network, images), size=images.shape[1:3], nfe=nfe)
            step(count)


def conclude(
    evaluators: Sequence[Evaluator],
    run: LoadedRun,
    options: SampleOptions,
    dataset: LatentDataset,
    autoencoder: Autoencoder,
) -> list[Evaluation]:
    """The evaluations, on rank 0, once every rank draws its share; waits for what is missing."""
    every = [each.parts_of(run, options, dataset, autoencoder) for each in evaluators]
    first = every[0].read(0)
    decay = run.state.get("ema_decay", run.config.optimizer.ema_decay)
    how = {
        "labels": options.labels,
        "classes": None if set(np.unique(dataset.labels).tolist()) <= set(options.classes) else options.classes,
        "sampler": options.text(seed=False),
        "num_steps": options.num_steps,
        "nfe": round(float(first["nfe"])),
        "guidance": options.cfg_scale,
        "guidance_interval": (options.guidance_low, options.guidance_high),
        "seed": options.seed,
        "weights": f"ema {decay:g}" if options.weights == "ema" else "raw",
        "precision": options.precision,
        "decoder": autoencoder.identity,
    }
    size = (int(first["size"][0]), int(first["size"][1]))
    return [each.evaluation(parts, run.step, size, **how) for each, parts in zip(evaluators, every, strict=True)]


def open_reference(
    given: str | None, dataset: LatentDataset | None, network: Network, folder: Path, count: int | None, world: World
) -> ReferenceSource:
    """The reference that was named, or the data set that a run was trained on.

    given: an .npz of statistics (ADM's, torch-fidelity's), a folder of images, an .npz or a .tar of images, or a folder
    of shards. count: images taken of shards, evenly spaced; None: all. Raises UserError where there is none.
    """
    path = None if given is None else Path(given)
    if path is None and dataset is None:
        raise UserError("images from files have no data set to be compared with; name one with --reference")
    if path is not None and is_shards(path):
        dataset, path = open_dataset(path), None
    if path is None:
        assert dataset is not None
        return ReferenceSource(ShardImages(dataset, count, world.device), network, folder)
    if count is not None:
        raise UserError(f"--reference-count is for shards, and {path} holds none; drop it")
    return ReferenceSource(path if is_statistics(path) else open_images(path), network, folder)


def prepared(
    source: ReferenceSource,
    network: Network,
    metrics: Sequence[str],
    asked: bool,
    folder: Path,
    world: World,
    step: Step,
) -> tuple[Evaluator, list[str]]:
    """Extracts the reference's features; the evaluator, and a line for each usual metric that it cannot give.

    asked: metrics were asked for, so that one that cannot be had raises UserError. Ranks beside 0 keep all metrics.
    """
    source.extract(world, step)
    if world.rank:
        return Evaluator(network, None, tuple(metrics), folder, world), []
    reference = source.read()
    chosen, left = possible(metrics, asked, reference)
    return Evaluator(network, reference, chosen, folder, world), left


@contextmanager
def counted(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Yields a function that gives the calls of a model since it was last asked."""
    count = [0]

    def more(*_: object) -> None:
        count[0] += 1

    def since() -> int:
        found, count[0] = count[0], 0
        return found

    handle = model.register_forward_pre_hook(more)
    try:
        yield since
    finally:
        handle.remove()
