"""Batch norm whose statistics are those of all ranks, and which is told what to use rather than put into a mode."""

import torch
from torch import Tensor, nn

from dit_fast.world import ranks, sum_over_ranks


class BatchNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) of each channel of x [N, C, H, W], times weight plus bias where it is affine.

    Called, it uses the mean and variance of the batch, of all ranks of the process group together: two all-reduces,
    with gradients through them; each rank has as many values. Where it is `tracked`, it then moves
    the running mean and the (unbiased) running variance by `momentum`: once for each call. `running` uses those.
    Computed in at least float32. Names and buffers are those of torch's BatchNorm2d.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, channels: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True, tracked: bool = True
    ):
        super().__init__()
        self.eps, self.momentum, self.affine, self.tracked = eps, momentum, affine, tracked
        if affine:
            self.weight = nn.Parameter(torch.ones(channels, dtype=torch.float32))
            self.bias = nn.Parameter(torch.zeros(channels, dtype=torch.float32))
        if tracked:
            self.register_buffer("running_mean", torch.zeros(channels, dtype=torch.float32))
            self.register_buffer("running_var", torch.ones(channels, dtype=torch.float32))
            self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = wide[:, 0].numel() * ranks()
        mean = sum_over_ranks(wide.sum((0, 2, 3))) / count
        var = sum_over_ranks((wide - _channels(mean)).square().sum((0, 2, 3))) / count
        if self.tracked:
            self._track(mean.detach(), var.detach() * (count / max(1, count - 1)))
        return self._normalised(wide, mean, var)

    def running(self, x: Tensor) -> Tensor:
        """x by the running statistics, which are constants to it and stay as they are."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self._normalised(wide, self.running_mean, self.running_var)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked += 1

    def _normalised(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        y = (x - _channels(mean)) * _channels((var + self.eps).rsqrt())
        return y * _channels(self.weight) + _channels(self.bias) if self.affine else y


def _channels(vector: Tensor) -> Tensor:
    """[C] against [N, C, H, W]."""
    return vector[:, None, None]
