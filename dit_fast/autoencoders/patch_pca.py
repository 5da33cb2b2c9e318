"""Closed-form autoencoder: principal components of image patches. No weights to download, deterministic (std = 0).

Each patch of 3 * p * p values is projected on the leading eigenvectors of the patch covariance. Channels are scaled by
1 / sqrt(their standard deviation), not to unit variance: the leading ones carry most of the picture and stay larger.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from dit_fast import files
from dit_fast.data.address import read_bytes
from dit_fast.data.files import reason, weights_identity
from dit_fast.errors import DataError

FORMAT = "dit_fast patch pca 1"
MAX_PATCH = 64  # the covariance has (3 * patch^2)^2 entries
MAX_BYTES = 1 << 28


class PatchPCA:
    """patch: pixels per latent along a side. mean [3 p p], basis [channels, 3 p p] (orthonormal rows), std
    [channels].
    """

    shift: float | Sequence[float] = 0.0
    config: Mapping[str, Any] = {}
    std = True

    def __init__(
        self, patch: int, mean: torch.Tensor, basis: torch.Tensor, std: torch.Tensor, identity: str = "pca:unsaved"
    ):
        self.factor, self.channels, self.identity = patch, basis.shape[0], identity
        self._mean, self._basis, self._std = mean, basis, std
        self.scale: Sequence[float] = tuple(std.clamp(min=1e-6).rsqrt().tolist())

    @classmethod
    def fit(cls, images: np.ndarray, patch: int = 4, channels: int = 12) -> "PatchPCA":
        """images: uint8 [N, S, S, 3]. Raises DataError unless patch divides S and channels are at most 3 * patch^2."""
        n, height, width, _ = images.shape
        dim = 3 * patch * patch
        cls.check(height, width, patch, channels)
        total, moment = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
        count = n * (height // patch) * (width // patch)
        for first in range(0, n, 512):
            rows = to_patches(to_float(images[first : first + 512]), patch).reshape(-1, dim).double()
            total, moment = total + rows.sum(0), moment + rows.T @ rows
        mean = total / count
        values, vectors = torch.linalg.eigh(moment / count - torch.outer(mean, mean))
        basis = vectors.flip(1)[:, :channels].T.contiguous()
        # an eigenvector's sign is arbitrary: make its largest entry positive
        basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
        std = values.flip(0)[:channels].clamp(min=0).sqrt()
        return cls(patch, mean.float(), basis.float(), std.float())

    @staticmethod
    def check(height: int, width: int, patch: int, channels: int) -> None:
        """Raises DataError unless images of this size can be fitted with this patch and these channels."""
        if not 1 <= patch <= MAX_PATCH:
            raise DataError(f"patch={patch} is outside 1..{MAX_PATCH}; change patch")
        if height % patch or width % patch:
            raise DataError(
                f"image size {height}x{width} is not a multiple of the patch size {patch}; change size or patch"
            )
        if not 1 <= channels <= 3 * patch * patch:
            raise DataError(
                f"channels={channels} is outside 1..{3 * patch * patch} (3 * patch^2); change channels or patch"
            )

    @classmethod
    def load(cls, path: str | Path) -> "PatchPCA":
        """Reads what `save` wrote, from a file or address. Raises DataError naming a missing or foreign file."""
        data, tensors, meta = read_tensors(path, "a patch PCA autoencoder")
        if meta.get("format") != FORMAT:
            raise DataError(
                f"{path}: not a patch PCA autoencoder; make one with `dit-fast shards build --autoencoder pca`"
            )
        absent = torch.zeros((), dtype=torch.float32)
        mean, basis, std = (tensors.get(name, absent) for name in ("mean", "basis", "std"))
        patch, channels = round((mean.numel() / 3) ** 0.5), std.numel()
        dim = 3 * patch * patch
        if (mean.shape, basis.shape, std.shape) != ((dim,), (channels, dim), (channels,)) or not all(
            item.is_floating_point() and item.isfinite().all() for item in (mean, basis, std)
        ):
            raise DataError(f"{path}: a patch PCA with arrays that are missing, misshapen or not finite; fit it again")
        identity = f"pca:{hashlib.sha256(data).hexdigest()[:16]}"  # as weights_identity has it
        return cls(patch, mean, basis, std, identity)

    def file_bytes(self) -> bytes:
        """The safetensors file as bytes; equal fits give equal bytes."""
        from safetensors.torch import save

        tensors = {"mean": self._mean, "basis": self._basis, "std": self._std}
        return save(tensors, {"format": FORMAT})  # one entry only: safetensors writes several in random order

    def save(self, path: str | Path) -> None:
        """Writes safetensors; from then on `identity` is the hash of that file."""
        files.replace(Path(path), self.file_bytes())
        self.identity = weights_identity("pca", [Path(path)])

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images [N, 3, S, S] in [-1, 1] -> coefficients [N, channels, S/p, S/p] and zeros."""
        size = images.shape[-1] // self.factor
        coefficients = (to_patches(images, self.factor) - self._mean) @ self._basis.T
        latents = coefficients.transpose(1, 2).reshape(len(images), self.channels, size, size)
        return latents, torch.zeros_like(latents)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Coefficients [N, channels, h, w] -> images [N, 3, h p, w p]."""
        rows = latents.to(self._basis.dtype).flatten(2).transpose(1, 2) @ self._basis + self._mean
        return from_patches(rows, self.factor, (latents.shape[2], latents.shape[3]))

    def to(self, device: torch.device | str) -> Self:
        self._mean, self._basis, self._std = (item.to(device) for item in (self._mean, self._basis, self._std))
        return self


def to_float(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, S, S, 3] -> float32 [N, 3, S, S] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 127.5 - 1


def to_patches(images: torch.Tensor, p: int) -> torch.Tensor:
    """[N, 3, S, S] -> [N, (S/p)^2, 3 p p], patches row by row, channel slowest."""
    n, _, height, width = images.shape
    grid = images.reshape(n, 3, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
    return grid.reshape(n, (height // p) * (width // p), 3 * p * p)


def read_tensors(path: str | Path, what: str) -> tuple[bytes, dict[str, torch.Tensor], dict[str, str]]:
    """Bytes, tensors and metadata of a safetensors file or address. Raises DataError where that is not readable."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = read_bytes(str(path), MAX_BYTES)  # not mapped: the tensors must outlive the file
    try:
        tensors, header = load(data), json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as {what} ({reason(error)})") from None
    return data, tensors, header.get("__metadata__") or {}


def from_patches(rows: torch.Tensor, p: int, grid: tuple[int, int]) -> torch.Tensor:
    """Inverse of `to_patches`: [N, h w, 3 p p] -> [N, 3, h p, w p]. grid: (h, w)."""
    pixels = rows.reshape(len(rows), *grid, 3, p, p).permute(0, 3, 1, 4, 2, 5)
    return pixels.reshape(len(rows), 3, grid[0] * p, grid[1] * p)
