"""Images from the weights of a run: keyed noise, guidance, the data set's own decoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from dit_fast import autoencoders
from dit_fast.autoencoders.pixels import decode_images
from dit_fast.checkpoint.run import LoadedRun, load_run
from dit_fast.data import LatentDataset
from dit_fast.diffusion import Guidance, initial_noise, sample
from dit_fast.diffusion.guidance import Channels
from dit_fast.diffusion.samplers import MOST_ROWS, check_options, check_whole
from dit_fast.errors import DataError, UserError
from dit_fast.models import Backbone
from dit_fast.tree import each, image

FILE_NAME = "samples.npz"
SHOWN_CLASSES = 10
MOST_IMAGES = 1_000_000  # of a class
GUIDED = 2.5  # scale of the guidance where none is asked for


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What to draw. classes: labels, empty for the first ten; weights: the moving average or the raw weights.

    cfg_scale None: 2.5 where the model has a trained null label, else 1 (no guidance). cfg_channels None: what the
    model's own sampler guides. chunk: images computed together. Raises UserError naming a value that cannot be meant.
    """

    classes: tuple[int, ...] = ()
    per_class: int = 8
    sampler: str = "heun"
    num_steps: int = 20
    cfg_scale: float | None = None
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    cfg_channels: Channels | None = None
    seed: int = 0
    weights: Literal["ema", "model"] = "ema"
    chunk: int = 16

    def __post_init__(self) -> None:
        check_whole("per_class", self.per_class, 1, MOST_IMAGES)
        check_whole("chunk (--batch)", self.chunk, 1, MOST_ROWS)
        check_options(self.sampler, self.num_steps, self.chunk, self.seed)
        scale = 1.0 if self.cfg_scale is None else self.cfg_scale
        Guidance(scale, self.guidance_low, self.guidance_high, self.cfg_channels or "all")
        twice = [label for label in self.classes if self.classes.count(label) > 1]
        if twice:
            raise UserError(f"class {twice[0]} is listed twice; raise per_class for more images of each class")

    def resolved(self, model: Backbone) -> "SampleOptions":
        """The same with what the model decides filled in."""
        guided = GUIDED if model.null_label >= 0 else 1.0
        scale = guided if self.cfg_scale is None else self.cfg_scale
        return replace(self, cfg_scale=scale, cfg_channels=self.cfg_channels or model.cfg_channels)

    def text(self) -> str:
        """One line for captions: what was computed."""
        assert self.cfg_scale is not None, "resolve the options first"
        parts = [self.sampler, f"{self.num_steps} steps", f"guidance {_exact(self.cfg_scale)}"]
        if self.cfg_scale != 1 and (self.guidance_low, self.guidance_high) != (0, 1):
            parts[-1] += f" for t in [{_exact(self.guidance_low)}, {_exact(self.guidance_high)}]"
        if self.cfg_scale != 1 and self.cfg_channels == "first_three":
            parts[-1] += " on channels 0 to 2"
        return ", ".join([*parts, f"seed {self.seed}", *(["raw weights"] if self.weights == "model" else [])])


@dataclass(frozen=True)
class Samples:
    """images uint8 [N, H, W, 3], labels int64 [N], the step of the weights and how the images were drawn."""

    images: np.ndarray
    labels: np.ndarray
    step: int
    text: str

    def save(self, path: Path) -> None:
        """Writes an .npz whose `arr_0` and `label` are what ADM's evaluation reads."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.stem}.partial.npz")
        np.savez(partial, arr_0=self.images, label=self.labels, step=np.int64(self.step), text=np.array(self.text))
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Samples":
        """Raises DataError when the file was not written by `save`."""
        try:
            with np.load(path, allow_pickle=False) as file:
                loaded = cls(file["arr_0"], file["label"], int(file["step"]), str(file["text"]))
            if loaded.images.dtype != np.uint8 or loaded.images.shape[3:] != (3,) or loaded.labels.dtype.kind != "i":
                raise ValueError("images or labels of another type")
            if loaded.labels.shape != loaded.images.shape[:1] or not len(loaded.labels):
                raise ValueError("no label for each image")
        except Exception as error:  # damaged archives raise whatever their readers stumble over
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DataError(f"{path}: not a file of samples ({reason}); make one with `dit-fast sample RUN`") from None
        return loaded


def sample_run(
    run: str | Path,
    options: SampleOptions,
    progress: Callable[[int, int], None] | None = None,
    data: str | Path | None = None,
) -> Samples:
    """Draws images from the newest checkpoint of a run folder; data: where its data set lies now, if it moved.

    Raises UserError for a label outside the data set's classes, guidance of a model without a null label, a run or
    shards that cannot be read, and images that are not finite, naming the first.
    """
    loaded = load_run(run, weights=options.weights)
    return draw_samples(loaded, loaded.dataset(data), options, progress)


def draw_samples(
    loaded: LoadedRun,
    dataset: LatentDataset,
    options: SampleOptions,
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """As `sample_run`, of a run (read with options.weights) and its data set that are open already.

    Image k has class classes[k % len(classes)] and depends on the seed, on k and on that class, not on how many are
    drawn or on the device's batch; equal `chunk` gives equal bytes. progress(done, total) counts images.
    """
    classes = check_classes(options.classes, dataset)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, autoencoder = loaded.model.to(device), autoencoders.of(dataset).to(device)
    options = options.resolved(model)
    index = torch.arange(options.per_class * len(classes), dtype=torch.int64)
    labels = torch.tensor(classes, dtype=torch.int64).repeat(options.per_class)
    assert options.cfg_scale is not None
    done = []
    for rows in index.split(options.chunk):
        noise = initial_noise(options.seed, rows, model.shapes["image"])
        latents = sample(
            model,
            each(lambda leaf: leaf.to(device), noise),
            labels[rows].to(device),
            sampler=options.sampler,
            num_steps=options.num_steps,
            cfg_scale=options.cfg_scale,
            guidance_low=options.guidance_low,
            guidance_high=options.guidance_high,
            cfg_channels=options.cfg_channels,
            seed=options.seed,
            index=rows.to(device),
            path=loaded.config.flow.path,
            chunk=options.chunk,
        )
        done.append(image(latents))
        if progress is not None:
            progress(sum(map(len, done)), len(index))
    latents = torch.cat(done)
    origin = f"weights of step {loaded.step}"
    images = decode_images(latents, dataset.info, autoencoder, options.chunk, origin)
    return Samples(images, labels.numpy(), loaded.step, options.text())


def check_classes(classes: Sequence[int], dataset: LatentDataset) -> tuple[int, ...]:
    """The classes asked for, or the first ten that have images. Raises UserError for a label the data set lacks."""
    count = dataset.info.num_classes
    for label in classes:
        if not 0 <= label < count:
            raise UserError(f"class {label} is not in this data set; labels are 0..{count - 1}")
    return tuple(classes) or tuple(np.unique(dataset.labels)[:SHOWN_CLASSES].tolist())


def _exact(number: float) -> str:
    return repr(float(number)).removesuffix(".0")
