"""Shards from latents that others have made, without encoding an image again."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dit_fast.data.dataset import LatentDataset
from dit_fast.data.field import MOMENTS, Field
from dit_fast.data.files import check_output, digest_files, reason, shown
from dit_fast.data.shards import MOMENTS_MEMBER
from dit_fast.data.writer import check_amounts, check_scaling, write_dataset
from dit_fast.errors import ConfigError, DataError
from dit_fast.options import check_choice
from dit_fast.preparation.foreign import Latents, open_latents
from dit_fast.preparation.vae_sd import count_classes

Form = Literal["mean", "mean-std", "mean-logvar"]


class _Producer:
    """scale, shift: of latents that are in model space as they lie there; they are stored unscaled."""

    def __init__(self, source: Latents, form: Form, dtype: str, scale: Any, shift: Any):
        self.source, self.form = source, form
        self.scale, self.shift = (np.float64(value).reshape(-1, 1, 1) for value in (scale, shift))
        shape = self._moments(0).shape
        self.fields = {MOMENTS: Field(MOMENTS_MEMBER, shape, dtype)}

    def name(self, number: int) -> str:
        return self.source.name(number)

    def samples(self, numbers: np.ndarray, shard: int) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        for number in numbers.tolist():
            yield {MOMENTS: self._moments(number)}, int(self.source.labels[number])

    def _moments(self, number: int) -> np.ndarray:
        """float32 [1, C, h, h] or, with standard deviations, [2, C, h, h]."""
        where = self.source.name(number)
        try:
            array = np.asarray(self.source.read(number))
        except Exception as error:  # the libraries of the formats raise many kinds
            raise DataError(f"{where}: cannot be read ({reason(error)}); restore it") from None
        if array.ndim == 4 and len(array) == (1 if self.form == "mean" else 2):
            array = array.reshape(-1, *array.shape[2:])
        halves = 1 if self.form == "mean" else 2
        if array.ndim != 3 or array.shape[1] != array.shape[2] or len(array) % halves or array.dtype.kind != "f":
            wanted = "[C, h, h]" if halves == 1 else "[2 C, h, h]"
            raise DataError(f"{where}: {array.dtype} {array.shape}, expected floats {wanted} for --form {self.form}")
        moments = array.astype(np.float64).reshape(halves, -1, *array.shape[1:])
        if self.form == "mean-logvar":
            moments[1] = np.exp(moments[1] / 2)
        moments[0] = (moments[0] - self.shift) / self.scale
        if halves == 2:
            moments[1] /= self.scale
            if moments[1].min() < 0:
                raise DataError(f"{where}: negative standard deviations; is it --form mean-logvar?")
        return moments.astype(np.float32)


def import_latents(
    src: str | Path,
    out: str | Path,
    *,
    latents: str | None = None,
    labels: str | None = None,
    form: Form = "mean",
    scale: float | None = None,
    shift: float | None = None,
    scaled: bool = False,
    num_classes: int | None = None,
    autoencoder: str = "",
    dtype: Literal["float16", "float32"] = "float16",
    samples_per_shard: int = 2048,
    processes: int = 1,
    progress: bool = True,
) -> LatentDataset:
    """Writes the latents in folder `src` (`foreign.open_latents`) to shards in `out`; continues what is there.

    latents, labels: columns or members, where their names are not the usual ones. form: "mean" [C, h, h], or both
    moments [2 C, h, h], the second half std or log variance. scale, shift: model-space latents are z * scale + shift;
    default: what the source says, else what gives each channel mean 0 and deviation 1. scaled: what lies there is in
    model space already (scale must be known). num_classes: default: the source's names, else largest label + 1,
    and then every class must have a latent. autoencoder: a spec of `load_autoencoder`, for drawing; "" if unknown.
    Raises ConfigError for options that do not fit, DataError naming the file and row that cannot be read.
    """
    root, folder = Path(src), check_output(out)
    check_amounts(samples_per_shard, processes)
    check_choice("dtype", dtype, Literal["float16", "float32"])
    check_choice("form", form, Form)
    if folder.resolve() == root.resolve():
        raise DataError(f"{shown(root)}: is both source and output; choose another folder for the output")
    source = open_latents(root, latents, labels)
    if not len(source.labels):
        raise DataError(f"{shown(root)}: holds no latents")
    if source.left_out:
        print(f"not imported: {', '.join(source.left_out)}", file=sys.stderr)
    known = source.scale is not None or scale is not None
    scales: Any = source.scale if scale is None else scale
    shifts: Any = (source.shift if scale is None else None) if shift is None else shift
    shifts = 0.0 if shifts is None else shifts
    if not known and (scaled or shift is not None):
        raise ConfigError(f"{'--scaled' if scaled else '--shift'} needs --scale, which the source does not say")
    if known:
        check_scaling(scales, shifts)
    names = source.class_names if num_classes is None else None
    entries = [(f"latent {number}", label) for number, label in enumerate(source.labels.tolist())]
    classes = count_classes(entries, num_classes or (len(names) if names else None), root)
    identity = f"unknown ({source.kind})"
    if autoencoder:
        from dit_fast.autoencoders import load_autoencoder

        identity = load_autoencoder(autoencoder).identity
    producer = _Producer(source, form, dtype, scales if scaled else 1.0, shifts if scaled else 0.0)
    settings = {
        "imported": source.kind, "source": digest_files(root, source.files, progress), "images": len(source.labels),
        "latents": latents, "labels": labels, "form": form, "scale": scales, "shift": shifts if known else None,
        "scaled": scaled, "num_classes": classes, "autoencoder": identity, "dtype": dtype,
        "samples_per_shard": samples_per_shard,
    }  # fmt: skip
    info = {
        "num_classes": classes,
        "class_names": list(names or map(str, range(classes))),
        **({"scale": scales, "shift": shifts} if known else {}),
        "autoencoder": {"identity": identity, "spec": autoencoder},
    }
    order = np.arange(len(source.labels), dtype=np.int64)
    return write_dataset(folder, producer, order, info, settings, samples_per_shard, processes, progress)
