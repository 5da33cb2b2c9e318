"""LayerNorm and RMSNorm over the last dimension for the references.

LayerNorm is torch's, or written out where forward mode is on: torch's forward-mode formula holds the saved statistics
constant when it is itself differentiated, and d/dW |jvp|^2 comes out wrong, by a quarter or by its sign. Its second
derivative in reverse mode is right, and it is one pass instead of five, so plain backward passes keep it.
"""

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` of rows [..., D]; weight, bias: [D], all of one dtype.

    Exact in every combination of the two modes of differentiation up to the second derivative, and within a
    forward-mode level any number of times.
    """
    if forward_ad._current_level < 0:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    centred = x - x.mean(-1, keepdim=True)
    result = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` of rows [..., D] (arXiv 1910.07467); weight: [D], of x's dtype."""
    result = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return result if weight is None else result * weight
