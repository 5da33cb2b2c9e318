"""Networks whose features numbers are of, by a spec: Inception from a local file, or any encoder of `load_encoder`.

    adm:FILE              Inception as ADM's evaluator uses it: FID, sFID, IS, precision, recall
    torch-fidelity:FILE   the same network, with that library's IS (10 shuffled parts): FID, IS
    efficientnet-lite0    the packaged network (extra `repa`): FD-EffLite0
    dinov2-vit-l:PATH     and every other encoder of `dit_fast.encoders`: FD-DINOv2-L

Only numbers of Inception's features are called FID, sFID and IS.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_fast.data.files import weights_identity
from dit_fast.encoders import FeatureEncoder, PretrainedViT, load_encoder
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.evaluation.inception import SIDE, Inception, load_inception

PACKAGED = "efficientnet-lite0"
FORMS = f"adm:FILE, torch-fidelity:FILE (Inception's weights), {PACKAGED}, dinov2-vit-l:PATH or another encoder"
BATCH = 64  # images of a forward pass
LARGEST = 224  # pixels of an encoder's input
NO_INCEPTION = (
    "no weights of the Inception network were given, so there is no FID, sFID or IS (--network adm:FILE or "
    "torch-fidelity:FILE); measuring with the packaged network instead, under its own name: FD-EffLite0"
)
Kind = Literal["adm", "torch-fidelity", "encoder"]


class Network(Protocol):
    """Features of images; "pool" is what distances are of.

    name: in names of metrics, "" for Inception. title, identity and resizing: for the protocol. kind: "adm",
    "torch-fidelity" or "encoder", which decides the default metrics and labels.
    """

    name: str
    title: str
    identity: str
    kind: Kind

    def resizing(self, size: tuple[int, int]) -> str:
        """How images of (height, width) come to its input."""
        ...

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [N, H, W, 3] on any device -> float32 [N, D] by name, on the CPU."""
        ...


def load_network(spec: str, device: torch.device) -> Network:
    """Raises UserError for an unknown form, a missing file or package, or weights of another network."""
    kind, _, path = spec.partition(":")
    if kind == "adm" or kind == "torch-fidelity":
        if not path:
            raise ConfigError(f"--network {kind} needs Inception's weights; give {kind}:FILE, or --network {PACKAGED}")
        return InceptionFeatures(Path(path), "adm" if kind == "adm" else "torch-fidelity", device)
    # the encoder's map of stride 32 is its last one
    try:
        encoder = load_encoder(f"{PACKAGED}:32" if spec == PACKAGED else spec)
    except ConfigError as error:
        raise ConfigError(f"network '{spec}': {error}; other networks: adm:FILE, torch-fidelity:FILE") from None
    return EncoderFeatures(kind, encoder, device)


def in_batches(network: Network, images: Tensor, batch: int = BATCH) -> dict[str, Tensor]:
    """Features of any number of images, uint8 [N, H, W, 3]."""
    parts = [network(images[start : start + batch]) for start in range(0, len(images), batch)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class InceptionFeatures:
    """pool, spatial and logits of `Inception`."""

    name = ""

    def __init__(self, path: Path, kind: Kind, device: torch.device):
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; give Inception's weights, or --network {PACKAGED}")
        self.kind: Kind = kind
        self._device = device
        self.network: Inception = load_inception(path).to(device)
        self.title = f"Inception of 2015 ({'ADM' if kind == 'adm' else kind})"
        self.identity = weights_identity("inception-2015", [path])

    def resizing(self, size: tuple[int, int]) -> str:
        return f"TensorFlow 1 bilinear to {SIDE}, no antialiasing" if size != (SIDE, SIDE) else "not resized"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        with exactly():
            found = self.network(images.to(self._device).permute(0, 3, 1, 2))
        return {name: x.float().cpu() for name, x in found.items()}


class EncoderFeatures:
    """The class token; of an encoder without one, the mean of its tokens.

    Images are resized (bicubic, antialiased) to the encoder's input: 224 pixels or the next smaller multiple of the
    patch; EfficientNet-Lite0, which takes all sizes, to the multiple of 32 next to their own, within 64 and 224.
    """

    kind: Kind = "encoder"

    def __init__(self, kind: str, encoder: FeatureEncoder, device: torch.device):
        self._encoder, self._device, self.identity = encoder.to(device), device, encoder.identity
        if isinstance(encoder, PretrainedViT):
            family, _, size = encoder.name.partition("-vit-")
            self.name = f"{TITLES[family]}-{size.upper()}"
        else:
            self.name = "EffLite0" if kind == PACKAGED else kind
        self.title = self.name

    def resizing(self, size: tuple[int, int]) -> str:
        side = self._grid(size)[1]
        return f"bicubic, antialiased, to {side}" if size != (side, side) else "not resized"

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Tokens and pixels along a side of the input."""
        if isinstance(self._encoder, PretrainedViT):
            patch = self._encoder.network.sizes.patch
            return LARGEST // patch, LARGEST // patch * patch
        grid = min(max(math.ceil(max(size) / 32), 2), LARGEST // 32)
        return grid, grid * 32

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        grid, side = self._grid((images.shape[1], images.shape[2]))
        x = images.to(self._device).permute(0, 3, 1, 2).float()
        if x.shape[-2:] != (side, side):
            x = F.interpolate(x, (side, side), mode="bicubic", antialias=True, align_corners=False)
        with exactly():
            found = self._encoder(x.clamp(0, 255) / 127.5 - 1, grid)
        token = found["class_token"] if "class_token" in found else found["features"].mean(1)
        return {"pool": token.float().cpu()}


TITLES = {"dinov2": "DINOv2", "dino": "DINO", "mae": "MAE", "mocov3": "MoCo-v3", "clip": "CLIP", "ijepa": "I-JEPA"}


@contextmanager
def exactly() -> Iterator[None]:
    """Inside, CUDA computes float32 without TF32 and chooses no algorithm by its time."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
