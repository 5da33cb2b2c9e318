"""Folding our time direction into the weights, so that the official SiT code can use a model trained here.

Our v(x, t) has t from data to noise. The official SiT has s = 1 - t and the opposite sign. Its time features are
cos(s f) and sin(s f); with t = 1 - s, `cos(t f) = cos f cos(s f) + sin f sin(s f)` and
`sin(t f) = sin f cos(s f) - cos f sin(s f)`: a linear map of the features, absorbed by the first layer of the time MLP.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dit_fast.nn.embeddings import TimestepEmbedder

TIME_WEIGHT, HEAD_WEIGHT, HEAD_BIAS = "t_embedder.mlp.0.weight", "final_layer.linear.weight", "final_layer.linear.bias"


def reversed_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of ours as one of the published direction: time and sign folded in."""
    cos_f, sin_f = TimestepEmbedder.frequencies(torch.ones(1, dtype=torch.float64))[0].chunk(2)
    weight = state[TIME_WEIGHT]
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    folded = torch.cat([of_cos * cos_f + of_sin * sin_f, of_cos * sin_f - of_sin * cos_f], dim=1)
    return {
        **state,
        TIME_WEIGHT: folded.to(weight.dtype),
        HEAD_WEIGHT: -state[HEAD_WEIGHT],
        HEAD_BIAS: -state[HEAD_BIAS],
    }


def widened_state(state: Mapping[str, Tensor], patch_size: int) -> dict[str, Tensor]:
    """A state_dict whose head has twice the channels: the further ones are zero, and the official SiT drops them."""
    return {**state, **{name: _widened(state[name], patch_size) for name in (HEAD_WEIGHT, HEAD_BIAS)}}


def _widened(head: Tensor, patch_size: int) -> Tensor:
    """Rows are (patch row, patch column, channel), channel fastest: zeros follow each pixel's channels."""
    by_pixel = head.reshape(patch_size**2, -1, *head.shape[1:])
    return torch.cat([by_pixel, torch.zeros_like(by_pixel)], dim=1).flatten(0, 1)
