"""LPIPS from files of random weights, against its formula written out over torchvision's layers."""

import pytest
import torch
from torch.nn import functional as F

from dit_fast.autoencoders.lpips import LPIPS, WIDTHS
from dit_fast.errors import UserError
from tests.helpers.golden import assert_close


def test_lpips_is_its_formula(tmp_path):
    heads, state = {}, {}
    index, channels = 0, 3
    for number, widths in enumerate(WIDTHS):
        index += bool(number)
        for width in widths:
            state[f"features.{index}.weight"] = torch.randn(width, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
            state[f"features.{index}.bias"] = 0.1 * torch.randn(width)
            channels, index = width, index + 2
        heads[f"lin{number}.model.1.weight"] = torch.rand(1, channels, 1, 1)
    torch.save(state, tmp_path / "vgg16.pth")
    torch.save(heads, tmp_path / "vgg.pth")
    network = LPIPS(str(tmp_path / "vgg16.pth"), str(tmp_path / "vgg.pth"))
    x, y = torch.rand(2, 2, 3, 16, 16).mul(2).sub(1)
    last, total = (3, 8, 15, 22, 29), torch.zeros(2)  # where torchvision's relu{1_2, 2_2, 3_3, 4_3, 5_3} are
    mean, std = (torch.tensor(value)[:, None, None] for value in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    maps = [(image - mean) / std for image in (x, y)]
    pools = (4, 9, 16, 23)
    for index in range(30):
        if index in pools:
            maps = [F.max_pool2d(image, 2) for image in maps]
        elif f"features.{index}.weight" in state:
            maps = [
                F.conv2d(image, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1)
                for image in maps
            ]
        else:
            maps = [image.relu() for image in maps]
        if index in last:
            units = [image / (image.square().sum(1, keepdim=True).sqrt() + 1e-10) for image in maps]
            weight = heads[f"lin{last.index(index)}.model.1.weight"]
            total += ((units[0] - units[1]).square() * weight).sum(1).mean((1, 2))
    assert_close(network(x, y), total, 1e-4)
    assert network(x, x).abs().max() == 0
    del state["features.0.bias"]
    torch.save(state, tmp_path / "vgg16.pth")
    with pytest.raises(UserError, match=r"vgg16\.pth: 'features\.0\.bias' is missing, \[64\] is needed"):
        LPIPS(str(tmp_path / "vgg16.pth"), str(tmp_path / "vgg.pth"))
