"""Images from the weights of a run: keyed noise, guidance, the data set's own decoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from dit_fast.checkpoint.run import load_run
from dit_fast.data import open_dataset
from dit_fast.diffusion import sample
from dit_fast.diffusion.samplers import initial_noise
from dit_fast.errors import DataError, UserError
from dit_fast.report.grids import to_uint8

if TYPE_CHECKING:
    from dit_fast.data import DatasetInfo

FILE_NAME = "samples.npz"
SHOWN_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What to draw. classes: labels, empty for the first ten; weights: the moving average or the raw weights."""

    classes: tuple[int, ...] = ()
    per_class: int = 8
    sampler: str = "heun"
    num_steps: int = 20
    cfg_scale: float = 2.5
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    seed: int = 0
    weights: Literal["ema", "model"] = "ema"
    chunk: int = 16

    def text(self) -> str:
        """One line for captions."""
        interval = "" if (self.guidance_low, self.guidance_high) == (0.0, 1.0) else (
            f" for t in [{self.guidance_low:g}, {self.guidance_high:g}]"
        )  # fmt: skip
        return f"{self.sampler}, {self.num_steps} steps, guidance {self.cfg_scale:g}{interval}, seed {self.seed}"


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
                return cls(file["arr_0"], file["label"], int(file["step"]), str(file["text"]))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: not a file of samples ({error}); make one with `dit-fast sample RUN`") from None


def sample_run(run: str | Path, options: SampleOptions, progress: Callable[[int, int], None] | None = None) -> Samples:
    """Draws images from the newest checkpoint of a run folder.

    Image k has class classes[k % len(classes)] and depends on the seed, on k and on that class, not on how many are
    drawn or on the device's batch; equal `chunk` gives equal bytes. progress(done, total) counts sampler steps.
    Raises UserError for a label outside the data set's classes, DataError for a run or shards that cannot be read.
    """
    loaded = load_run(run, weights=options.weights)
    dataset = open_dataset(loaded.config.data.path)
    classes = check_classes(options.classes, dataset.info.num_classes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, autoencoder = loaded.model.to(device), dataset.load_autoencoder().to(device)
    count = options.per_class * len(classes)
    index = torch.arange(count)
    labels = torch.tensor(classes).repeat(options.per_class)
    noise = initial_noise(options.seed, index, (model.in_channels, model.input_size, model.input_size))
    latents = sample(
        model,
        noise.to(device),
        labels.to(device),
        sampler=options.sampler,
        num_steps=options.num_steps,
        cfg_scale=options.cfg_scale,
        guidance_low=options.guidance_low,
        guidance_high=options.guidance_high,
        seed=options.seed,
        index=index.to(device),
        path=loaded.config.flow.path,
        chunk=options.chunk,
        callback=progress,
    )
    pictures = [autoencoder.decode(part) for part in unscale(latents, dataset.info).float().split(options.chunk)]
    images = to_uint8(torch.cat(pictures).float().cpu().numpy())
    return Samples(images, labels.numpy(), loaded.step, options.text())


def check_classes(classes: Sequence[int], num_classes: int) -> tuple[int, ...]:
    """The classes asked for, or the first ten. Raises UserError for a label that the data set does not have."""
    for label in classes:
        if not 0 <= label < num_classes:
            raise UserError(f"class {label} is not in this data set; labels are 0..{num_classes - 1}")
    return tuple(classes) or tuple(range(min(SHOWN_CLASSES, num_classes)))


def unscale(latents: Tensor, info: "DatasetInfo") -> Tensor:
    """Model-space latents [N, C, h, w] back to the autoencoder's: (x - shift) / scale."""
    scale, shift = (
        torch.tensor(value, dtype=latents.dtype, device=latents.device).reshape(-1, 1, 1)
        for value in (info.scale, info.shift)
    )
    return (latents - shift) / scale
