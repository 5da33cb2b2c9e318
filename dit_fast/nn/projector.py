"""The alignment head of REPA (arXiv 2410.06940): three linear layers from a block's features to an encoder's."""

from torch import nn

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
