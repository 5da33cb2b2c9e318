"""The MLP of a transformer block."""

from torch import Tensor, nn

from dit_fast.nn.lending import LendingLinear
from dit_fast.nn.linear import linear_flops, xavier_linear
from dit_fast.ops import gelu_mlp

MLP_RATIO = 4


class Mlp(nn.Module):
    """Linear, tanh-approximated GELU, Linear over tokens [N, T, D]."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = xavier_linear(hidden_size, MLP_RATIO * hidden_size, LendingLinear)
        self.fc2 = xavier_linear(MLP_RATIO * hidden_size, hidden_size, LendingLinear)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x, lambda x, *of_fc1: self.fc2(x, lambda x, *of_fc2: gelu_mlp(x, *of_fc1, *of_fc2)))

    def flops(self, num_tokens: int) -> int:
        """Forward FLOPs of one sample, multiply-add = 2."""
        return linear_flops(self.fc1, num_tokens) + linear_flops(self.fc2, num_tokens)
