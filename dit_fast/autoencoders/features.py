"""Representation latents (RAE, arXiv 2510.11690): patch tokens of a frozen encoder, and a linear way back to pixels.

The encoder is one of `load_encoder`. The decoder is the closed form that needs no training: ridge regression from each
token to the pixels of its patch, fitted on the images of a data set and kept in a file with its error. The latents
depend on the encoder alone, so a better decoder may take its place.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dit_fast import files
from dit_fast.autoencoders.patch_pca import from_patches, read_tensors, to_patches
from dit_fast.encoders import FeatureEncoder, load_encoder
from dit_fast.errors import DataError

FORMAT = "dit_fast linear decoder 1"
RIDGE = 1e-3  # of tokens whose channels have variance 1
HELD_OUT = 10  # every tenth image is not fitted but measured


class FeatureAutoencoder:
    """patch: pixels per token along a side. weight [channels, 3 p p], bias [3 p p]: of the decoder, of raw tokens.

    about: "encoder" (identity), "spec" (where its weights lie), "source" (of the images), "size" (their side) and
    "error": mean squared error of pixels in [-1, 1], PSNR in dB and the number of images that both were measured on,
    "fitted" if no image was left out of the fit.

    There is no std: latents are points. scale and shift are None: the statistics of the data set give them.
    """

    scale = None
    shift = None
    std = False
    config: Mapping[str, Any]

    def __init__(self, patch: int, weight: Tensor, bias: Tensor, about: Mapping[str, Any]):
        self.factor, self.channels = patch, weight.shape[0]
        self.identity, self.config = f"features:{about['encoder']}", {"patch": patch}
        self.about = dict(about)
        self._weight, self._bias, self._device = weight, bias, torch.device("cpu")
        self._encoder: FeatureEncoder | None = None

    @classmethod
    def fit(
        cls, batches: Iterable[Tensor], encoder: str, patch: int, source: str = "", device: str = "cpu"
    ) -> "FeatureAutoencoder":
        """Fits the decoder on batches of float32 images [N, 3, S, S] in [-1, 1], in order.

        encoder: a spec of `load_encoder`. Raises DataError unless patch divides S, and what the encoder raises.
        """
        network = load_encoder(encoder).to(device)
        fitted = [_Moments(), _Moments()]  # to fit, to measure
        seen = size = 0
        for images in batches:
            side, size = _grid(images, patch), images.shape[-1]
            tokens = network(images.to(device), side)["features"].cpu().double()
            pixels = to_patches(images, patch).double()
            last = (torch.arange(seen, seen + len(images), dtype=torch.int64) + 1) % HELD_OUT == 0
            for part, rows in zip(fitted, (~last, last), strict=True):
                part.add(tokens[rows].flatten(0, 1), pixels[rows].flatten(0, 1), int(rows.sum()))
            seen += len(images)
        weight, bias = fitted[0].solve()
        measured = fitted[1] if fitted[1].images else fitted[0]
        mse = measured.error(weight, bias)
        error = {"mse": mse, "psnr": 10 * math.log10(4 / max(mse, 1e-12)), "images": measured.images}
        if measured is fitted[0]:
            error["fitted"] = True
        about = {
            "encoder": network.identity,
            "spec": _absolute(encoder),
            "source": source,
            "size": size,
            "error": error,
        }
        return cls(patch, weight.float().contiguous(), bias.float(), about)

    @classmethod
    def load(cls, path: str | Path) -> "FeatureAutoencoder":
        """Reads what `save` wrote, from a file or address. Raises DataError naming a missing or foreign file."""
        _, tensors, header = read_tensors(path, "a decoder of features")
        try:
            meta = json.loads(header.get("about", "{}"))
        except ValueError:
            meta = {}
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise DataError(
                f"{path}: not a decoder of features; make one with `dit-fast shards build --autoencoder "
                "features:ENCODER --patch P`"
            )
        patch, absent = meta["patch"], torch.zeros((), dtype=torch.float32)
        weight, bias = tensors.get("weight", absent), tensors.get("bias", absent)
        good = weight.dim() == 2 and weight.shape[1:] == bias.shape == (3 * patch * patch,)
        if not good or not all(item.is_floating_point() and item.isfinite().all() for item in (weight, bias)):
            raise DataError(f"{path}: a decoder with arrays that are missing, misshapen or not finite; fit it again")
        about = {key: value for key, value in meta.items() if key not in ("format", "patch")}
        return cls(patch, weight.float(), bias.float(), about)

    def file_bytes(self) -> bytes:
        """The safetensors file as bytes; equal fits give equal bytes."""
        from safetensors.torch import save

        meta = {"format": FORMAT, "patch": self.factor, **self.about}  # one entry: several come in random order
        return save({"weight": self._weight, "bias": self._bias}, {"about": json.dumps(meta, sort_keys=True)})

    def save(self, path: str | Path) -> None:
        """Writes safetensors."""
        files.replace(Path(path), self.file_bytes())

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        """images [N, 3, S, S] in [-1, 1] -> tokens [N, channels, S/p, S/p], unscaled. The encoder is read now.

        Raises DataError where its weights are not those that the file names.
        """
        if self._encoder is None:
            encoder = load_encoder(self.about["spec"])
            if encoder.identity != self.about["encoder"]:
                raise DataError(
                    f"{self.about['spec']}: is {encoder.identity}, but the latents were made with "
                    f"{self.about['encoder']}; restore that one"
                )
            self._encoder = encoder.to(self._device)
        side = _grid(images, self.factor)
        tokens = self._encoder(images, side)["features"]
        return tokens.transpose(1, 2).unflatten(2, (side, side)), None

    def decode(self, latents: Tensor) -> Tensor:
        """Tokens [N, channels, h, w], unscaled -> images [N, 3, h p, w p]."""
        rows = latents.to(self._weight.dtype).flatten(2).transpose(1, 2) @ self._weight + self._bias
        return from_patches(rows, self.factor, (latents.shape[2], latents.shape[3]))

    def to(self, device: torch.device | str) -> Self:
        self._device = torch.device(device)
        self._weight, self._bias = self._weight.to(device), self._bias.to(device)
        if self._encoder is not None:
            self._encoder.to(device)
        return self


class _Moments:
    """Sums of tokens x [C] and pixels y [P], and of their products, float64: all that a linear fit needs of them."""

    def __init__(self) -> None:
        self.images = self.rows = 0
        self._sums: list[Tensor | float] = [0.0] * 5

    def add(self, x: Tensor, y: Tensor, images: int) -> None:
        self.images, self.rows = self.images + images, self.rows + len(x)
        found = (x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum())
        self._sums = [before + each for before, each in zip(self._sums, found, strict=True)]

    def solve(self) -> tuple[Tensor, Tensor]:
        """weight [C, P], bias [P] of the least |x weight + bias - y|^2 + RIDGE |std_x weight|^2, means over rows."""
        x, y, xx, xy, _ = (torch.as_tensor(each) / self.rows for each in self._sums)
        covariance, cross = xx - torch.outer(x, x), xy - torch.outer(x, y)
        std = covariance.diagonal().clamp(min=1e-12).sqrt()
        ridge = covariance / torch.outer(std, std) + RIDGE * torch.eye(len(x), dtype=torch.float64)
        weight = torch.linalg.solve(ridge, cross / std[:, None]) / std[:, None]
        return weight, y - x @ weight

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Mean squared error of x weight + bias over rows and pixels."""
        x, y, xx, xy, yy = (torch.as_tensor(each) / self.rows for each in self._sums)
        square = ((xx @ weight) * weight).sum() + 2 * (x @ weight) @ bias + bias @ bias
        total = square - 2 * ((xy * weight).sum() + y @ bias) + yy
        return max(0.0, float(total)) / len(bias)


def _grid(images: Tensor, patch: int) -> int:
    size = images.shape[-1]
    if patch < 1 or size % patch:
        raise DataError(f"image size {size} is not a multiple of patch={patch}, the pixels of a token; change one")
    return size // patch


def _absolute(spec: str) -> str:
    """A spec of an encoder whose path stays right wherever it is read."""
    kind, separator, path = spec.partition(":")
    return f"{kind}:{Path(path).resolve()}" if separator and Path(path).exists() else spec
