"""The MLPs of a transformer block."""

from torch import Tensor, nn
from torch.nn import functional as F

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


class SwiGLU(nn.Module):
    """`w3(silu(a) * b)`, a and b the halves of w12(x), over tokens [N, T, D] (arXiv 2002.05202).

    Two thirds as wide inside as `Mlp`, so that it has as many parameters.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        width = 2 * MLP_RATIO * hidden_size // 3
        self.w12 = xavier_linear(hidden_size, 2 * width)
        self.w3 = xavier_linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)

    def flops(self, num_tokens: int) -> int:
        """Forward FLOPs of one sample, multiply-add = 2."""
        return linear_flops(self.w12, num_tokens) + linear_flops(self.w3, num_tokens)


class SeparateSwiGLU(nn.Module):
    """`w2(silu(w1(x)) * w3(x))` on tokens [N, T, D], inside as wide as `SwiGLU`; no biases (DDT, arXiv 2504.05741)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        width = 2 * MLP_RATIO * hidden_size // 3
        self.w1, self.w3 = (xavier_linear(hidden_size, width, bias=False) for _ in range(2))
        self.w2 = xavier_linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))

    def flops(self, num_tokens: int) -> int:
        """Forward FLOPs of one sample, multiply-add = 2."""
        return sum(linear_flops(layer, num_tokens) for layer in (self.w1, self.w3, self.w2))
