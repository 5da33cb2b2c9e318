"""The MLP of a transformer block."""

from torch import Tensor, nn

from dit_fast.nn.linear import Reads, linear_flops, xavier_linear
from dit_fast.ops import gelu_mlp

MLP_RATIO = 4


class Mlp(nn.Module):
    """Linear, tanh-approximated GELU, Linear over tokens [N, T, D]."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = xavier_linear(hidden_size, MLP_RATIO * hidden_size)
        self.fc2 = xavier_linear(MLP_RATIO * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)

    def reads(self) -> Reads:
        return [(self, self.fc1), (self, self.fc2)]

    def flops(self, num_tokens: int) -> int:
        """Forward FLOPs of one sample, multiply-add = 2."""
        return linear_flops(self.fc1, num_tokens) + linear_flops(self.fc2, num_tokens)
