"""Alignment heads of REPA (arXiv 2410.06940), from a block's features to an encoder's, and of SRA, to a block's."""

from torch import Tensor, nn
from torch.nn import functional as F

from dit_fast.nn.linear import xavier_linear


def projector(hidden_size: int, width: int, out_features: int) -> nn.Sequential:
    """[..., hidden_size] to [..., out_features] through two hidden layers of `width`, SiLU between."""
    return nn.Sequential(
        xavier_linear(hidden_size, width),
        nn.SiLU(),
        xavier_linear(width, width),
        nn.SiLU(),
        xavier_linear(width, out_features),
    )


class SelfProjector(nn.Module):
    """SRA's (arXiv 2505.02831): [..., width] to the same through a hidden layer of twice the width, SiLU between."""

    def __init__(self, width: int):
        super().__init__()
        self.linear1 = xavier_linear(width, 2 * width)
        self.linear2 = xavier_linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.silu(self.linear1(x)))
