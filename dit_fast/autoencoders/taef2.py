"""TAEF2, the tiny deterministic autoencoder of FLUX.2 (8 pixels per latent, 32 channels), from its published weights.

The network is read off the state dict: 3x3 convolutions, residual blocks of three convolutions with ReLU, some of which
first add a GroupNorm branch of 1x1 convolutions. Weights: taef2_encoder.pth and taef2_decoder.pth of madebyollin/taesd.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from dit_fast.data.files import reason, weights_identity
from dit_fast.errors import DataError

WIDTH, CHANNELS, FACTOR, NORM_GROUPS = 64, 32, 8, 4
FILES = ("taef2_encoder.pth", "taef2_decoder.pth")


class _Block(nn.Module):
    def __init__(self, pooled: bool):
        super().__init__()
        self.conv = nn.Sequential(_conv(WIDTH), nn.ReLU(), _conv(WIDTH), nn.ReLU(), _conv(WIDTH))
        inner = 4 * WIDTH
        branch = (nn.Conv2d(WIDTH, inner, 1, bias=False), nn.GroupNorm(NORM_GROUPS, inner), nn.ReLU())
        self.pool = nn.Sequential(*branch, nn.Conv2d(inner, WIDTH, 1, bias=False)) if pooled else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


class _Clamp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


def _conv(inputs: int, outputs: int = WIDTH, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


def _encoder() -> nn.Sequential:
    layers: list[nn.Module] = [_conv(3), _Block(False)]
    for stage in range(3):
        layers += [_conv(WIDTH, stride=2, bias=False), *(_Block(stage == 2) for _ in range(3))]
    return nn.Sequential(*layers, _conv(WIDTH, CHANNELS))


def _decoder() -> nn.Sequential:
    layers: list[nn.Module] = [_Clamp(), _conv(CHANNELS), nn.ReLU()]
    for stage in range(3):
        layers += [*(_Block(stage == 0) for _ in range(3)), nn.Upsample(scale_factor=2), _conv(WIDTH, bias=False)]
    return nn.Sequential(*layers, _Block(False), _conv(WIDTH, 3))


class TinyFlux2:
    """Deterministic: std = 0. Latents are used as they are (scale 1, shift 0)."""

    channels, factor = CHANNELS, FACTOR
    scale: float | Sequence[float] = 1.0
    std = True
    shift: float | Sequence[float] = 0.0
    config: Mapping[str, Any] = {}

    def __init__(self, encoder: nn.Module, decoder: nn.Module, identity: str):
        self._encoder, self._decoder, self.identity = encoder, decoder, identity

    @classmethod
    def load(cls, folder: str | Path) -> "TinyFlux2":
        """Reads both files of a folder. Raises DataError naming a missing or different file."""
        paths = [Path(folder) / name for name in FILES]
        networks = []
        for path, network in zip(paths, (_encoder(), _decoder()), strict=True):
            if not path.is_file():
                raise DataError(f"{path}: missing; put {FILES[0]} and {FILES[1]} of madebyollin/taesd there")
            try:
                network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
            except Exception as error:  # unpickling a damaged file raises many kinds
                raise DataError(f"{path}: not the weights of TAEF2 ({reason(error)}); fetch them again") from None
            networks.append(network.float().eval().requires_grad_(False))
        return cls(networks[0], networks[1], weights_identity("taef2", paths))

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images [N, 3, S, S] in [-1, 1] -> latents [N, 32, S/8, S/8] and zeros."""
        latents = self._encoder((images + 1) / 2)
        return latents, torch.zeros_like(latents)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents [N, 32, h, w] -> images [N, 3, 8 h, 8 w], about [-1, 1]."""
        return self._decoder(latents.float()) * 2 - 1

    def to(self, device: torch.device | str) -> Self:
        self._encoder.to(device)
        self._decoder.to(device)
        return self
