"""LPIPS (Zhang et al., arXiv 1801.03924) on VGG16, from two local files: the network's weights and the heads'."""

from pathlib import Path

import torch
from torch import Tensor, nn

from dit_fast.data.files import weights_identity
from dit_fast.errors import CheckpointError
from dit_fast.published import read_state

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # convolutions between poolings
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the input, for images in [-1, 1]
EPS = 1e-10


class LPIPS(nn.Module):
    """Distance [N] of images x, y [N, 3, H, W] in [-1, 1], H and W at least 16; frozen.

    The last rectified map of each of five stages is divided by its norm over the channels, squared differences are
    weighted per channel by a head and averaged over the pixels; the stages are summed.

    vgg16: torchvision's vgg16 or its `features` (`features.0.weight`, ...). heads: `lin0.model.1.weight`, ... as the
    packages lpips and torchmetrics carry them. Raises CheckpointError naming a file and the key that is missing or of
    another shape.
    """

    identity: str

    def __init__(self, vgg16: str, heads: str):
        super().__init__()
        stages, self.keys, index, channels = [], list[str](), 0, 3
        for number, widths in enumerate(WIDTHS):
            layers: list[nn.Module] = [nn.MaxPool2d(2, 2)] if number else []
            index += bool(number)
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                self.keys.append(str(index))
                channels, index = width, index + 2
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ParameterList(torch.empty(1, widths[-1], 1, 1, dtype=torch.float32) for widths in WIDTHS)
        convolutions = [module for module in self.stages.modules() if isinstance(module, nn.Conv2d)]
        state = read_state(vgg16).tensors
        prefix = "features." if any(name.startswith("features.") for name in state) else ""
        for key, module in zip(self.keys, convolutions, strict=True):
            for kind, parameter in module.named_parameters():
                _fill(parameter, state, f"{prefix}{key}.{kind}", vgg16)
        state = read_state(heads).tensors
        for number, parameter in enumerate(self.heads):
            _fill(parameter, state, f"lin{number}.model.1.weight", heads)
        self.identity = weights_identity("lpips-vgg16", [Path(vgg16), Path(heads)])
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mean, std = (torch.tensor(value, dtype=x.dtype, device=x.device)[:, None, None] for value in (MEAN, STD))
        maps, total = (torch.cat((x, y)) - mean) / std, x.new_zeros(len(x))
        for stage, head in zip(self.stages, self.heads, strict=True):
            maps = stage(maps)
            wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
            ours, theirs = (wide / (torch.linalg.vector_norm(wide, dim=1, keepdim=True) + EPS)).chunk(2)
            total = total + ((ours - theirs).square() * head).sum(1).mean((1, 2))
        return total


def _fill(parameter: Tensor, state: dict[str, Tensor], name: str, file: str) -> None:
    if name not in state or state[name].shape != parameter.shape:
        found = f"is {list(state[name].shape)}" if name in state else "is missing"
        raise CheckpointError(
            f"{file}: '{name}' {found}, {list(parameter.shape)} is needed; give the weights for LPIPS"
        )
    with torch.no_grad():
        parameter.copy_(state[name])
