"""Autoencoders behind one interface, chosen by a spec: `pca:FILE`, `diffusers:DIR`, `taef2:DIR`, `features:FILE`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import torch

from dit_fast.data.address import is_remote
from dit_fast.data.dataset import LatentDataset
from dit_fast.errors import ConfigError, DataError

FORMS = (
    "pca:FILE (patch PCA), diffusers:DIR (AutoencoderKL or AutoencoderTiny), taef2:DIR (FLUX.2's tiny autoencoder), "
    "features:FILE (an encoder's tokens, with a linear decoder)"
)
BESIDE = ("pca", "features")  # kinds that lie beside the shards, in one file


class Autoencoder(Protocol):
    """Images to latents and back. Model-space latents are (mean + std * noise) * scale + shift.

    factor: pixels per latent along a side. scale, shift: one number or one per channel; both None: those that give
    each channel of a data set mean 0 and deviation 1. std: whether a latent is a normal distribution; otherwise
    `encode` gives None for its std, and shards hold means alone. identity: kind and hash of the weights. config: what
    else decides the latents, as JSON; equal identities and configs give equal latents.
    """

    identity: str
    factor: int
    channels: int
    std: bool
    config: Mapping[str, Any]

    @property
    def scale(self) -> float | Sequence[float] | None: ...

    @property
    def shift(self) -> float | Sequence[float] | None: ...

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """images float [N, 3, S, S] in [-1, 1] -> mean, std [N, channels, S/factor, S/factor], unscaled."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Unscaled latents [N, channels, h, w] -> images [N, 3, h * factor, w * factor] in [-1, 1]."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Moves the weights; returns itself."""
        ...


def load_autoencoder(spec: str) -> Autoencoder:
    """The autoencoder a spec names. Raises ConfigError for an unknown form, DataError for missing or damaged files."""
    kind, separator, path = spec.partition(":")
    if not separator or kind not in ("pca", "diffusers", "taef2", "features") or not path:
        raise ConfigError(f"unknown autoencoder '{spec}'; valid forms: {FORMS}")
    if kind == "pca":
        from dit_fast.autoencoders.patch_pca import PatchPCA

        return PatchPCA.load(path)
    if kind == "features":
        from dit_fast.autoencoders.features import FeatureAutoencoder

        return FeatureAutoencoder.load(path)
    if kind == "taef2":
        from dit_fast.autoencoders.taef2 import TinyFlux2

        return TinyFlux2.load(path)
    from dit_fast.autoencoders.from_diffusers import DiffusersAutoencoder

    return DiffusersAutoencoder.load(path)


def of(dataset: LatentDataset) -> Autoencoder:
    """The autoencoder that made the latents of a data set. DataError when it is unknown or another one lies there."""
    info = dataset.info
    if not info.autoencoder:
        raise DataError(
            f"{dataset.root}: does not say where its autoencoder lies; give one, e.g. --autoencoder diffusers:DIR"
        )
    kind, _, place = info.autoencoder.partition(":")
    if is_remote(place) and kind not in BESIDE:
        raise DataError(
            f"{dataset.root}: its autoencoder {info.autoencoder} cannot be read over http; download it and put "
            "its place into autoencoder.spec of a local copy of dataset.json"
        )
    autoencoder = load_autoencoder(info.autoencoder)
    if autoencoder.identity != info.autoencoder_identity:
        raise DataError(
            f"{info.autoencoder}: is {autoencoder.identity}, but the latents of {dataset.root} were made with "
            f"{info.autoencoder_identity}; restore that one"
        )
    for key, value in json.loads(json.dumps(dict(autoencoder.config))).items():
        if info.autoencoder_config.get(key, value) != value:
            raise DataError(
                f"{info.autoencoder}: its {key} is {value}, but the latents of {dataset.root} were made with "
                f"{info.autoencoder_config[key]}; restore it"
            )
    return autoencoder
