"""Layers of Hugging Face's `kernels`: each replaces the forward of a module that has the attributes it names.

All have a backward and go through torch.compile without a break. `kernelize` puts them in the place of a layer that was
declared with `use_kernel_forward_from_hub`.
"""

from typing import Any

from torch import Tensor, nn

from dit_fast.ops import gate_residual, gate_residual_modulate, gelu_mlp, layer_norm_modulate, long_skip


class LayerNormModulate(nn.Module):
    """For a module with `norm`, a LayerNorm without weights: norm(x) * (1 + scale) + shift.

    x [N, T, D]; shift, scale [N, D].
    """

    can_torch_compile = True
    has_backward = True
    norm: nn.LayerNorm

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return layer_norm_modulate(x, shift, scale, eps=self.norm.eps)


class GateResidual(nn.Module):
    """x + gate * y: x, y [N, T, D]; gate [N, D]."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return gate_residual(x, y, gate)


class GateResidualModulate(nn.Module):
    """For a module with `norm`, a LayerNorm without weights: x + gate * y, and norm of it * (1 + scale) + shift."""

    can_torch_compile = True
    has_backward = True
    norm: nn.LayerNorm

    def forward(self, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Any:
        return gate_residual_modulate(x, y, gate, shift, scale, eps=self.norm.eps)


class LongSkip(nn.Module):
    """For a module with `norm`, LayerNorm(2 D), and `linear`, Linear(2 D, D): linear(norm(cat([x, skip], -1)))."""

    can_torch_compile = True
    has_backward = True
    norm: nn.LayerNorm
    linear: nn.Linear

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        norm, linear = self.norm, self.linear
        return long_skip(x, skip, norm.weight, norm.bias, linear.weight, linear.bias, norm.eps)


class GeluMlp(nn.Module):
    """For timm's Mlp with GELU(tanh) and no dropout: fc2(gelu(fc1(x)))."""

    can_torch_compile = True
    has_backward = True
    fc1: nn.Linear
    fc2: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return gelu_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
