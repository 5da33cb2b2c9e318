"""What `test_kernel_folder` runs in a process of its own: in a checkout, our folder hides the library `kernels`.

`kernel_user.py FOLDER`
"""

import sys
from pathlib import Path

import torch
from torch import nn

import kernels
from dit_fast import ops

SHAPES = {
    "layer_norm_modulate": [(2, 5, 8), (2, 8), (2, 8)],
    "gate_residual": [(2, 5, 8), (2, 5, 8), (2, 8)],
    "long_skip": [(2, 5, 8), (2, 5, 8), (16,), (16,), (8, 16), (8,)],
    "gelu_mlp": [(2, 5, 8), (16, 8), (16,), (8, 16), (8,)],
}


def draw(shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def ops_give_what_ours_give(loaded):
    for name, shapes in SHAPES.items():
        tensors = draw(shapes)
        values = [getattr(module, name)(*tensors) for module in (loaded, ops)]
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
        upstream = torch.randn_like(values[0])
        found = [torch.autograd.grad(value, tensors, upstream) for value in values]
        for theirs, own in zip(*found, strict=True):
            torch.testing.assert_close(theirs, own, rtol=1e-4, atol=1e-5)


@kernels.use_kernel_forward_from_hub("Skip")
class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x, skip):
        return self.linear(self.norm(torch.cat([x, skip], -1)))


def a_layer_takes_the_place_of_another(folder):
    layer = Skip()
    x, skip = draw([(2, 5, 8), (2, 5, 8)])
    plain = layer(x, skip)
    mapping = {"Skip": {"cpu": kernels.LocalLayerRepository(folder, layer_name="LongSkip")}}
    with kernels.use_kernel_mapping(mapping):
        changed = kernels.kernelize(layer, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, device="cpu")
    assert "long_skip" in changed.forward.__func__.__code__.co_names
    torch.testing.assert_close(changed(x, skip), plain, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    ops_give_what_ours_give(kernels.get_local_kernel(where))
    a_layer_takes_the_place_of_another(where)
