"""Checkpoints of DDT (arXiv 2504.05741). What they do not say is where the decoder begins, and the size of an image."""

import dataclasses
import math
from collections.abc import Mapping

from torch import Tensor

from dit_fast.checkpoint.layout import Family, Known, read_classes, read_depth, read_heads, shape, with_labels
from dit_fast.errors import CheckpointError
from dit_fast.models import DDT
from dit_fast.tree import Tree, image

USUAL_CHANNELS = (4, 3)  # of latents, of pixels: the sizes before the first image


class OfficialDDT(DDT):
    """Official weights, which fit every image: its channels tell the size of a patch, and it the number of tokens.

    What the model says of itself (`shapes`, `grid`, `config`, ...) is of the last image.
    """

    def _check(self, x: Tree, t: Tensor, y: Tree) -> None:
        given, features = tuple(image(x).shape[1:]), self.config.in_channels * self.config.patch_size**2
        if len(given) == 3 and given != self.shapes["image"] and min(given):
            channels, height, width = given
            patch = math.isqrt(features // channels)
            if channels * patch**2 == features and height % patch == width % patch == 0:
                self.place(
                    dataclasses.replace(
                        self.config, in_channels=channels, input_size=height, input_width=width, patch_size=patch
                    )
                )
                self.rope.to(image(x).device)
        super()._check(x, t, y)


def _empty(state: Mapping[str, Tensor], known: Known) -> OfficialDDT:
    width, features = shape(state, "x_embedder.proj.weight", 2)
    if known.encoder_depth is None:
        raise CheckpointError(
            f"a DDT state_dict does not say how many of its {read_depth(state)} blocks are the encoder's; pass "
            "encoder_depth (published: 8 for B, 20 for L, 22 for XL)"
        )
    squares = (channels for channels in USUAL_CHANNELS if math.isqrt(features // channels) ** 2 * channels == features)
    channels = next(squares, features)
    patch = math.isqrt(features // channels)
    classes, null_row, dropout = read_classes(state, known)
    config = DDT.Config(
        name="",
        input_size=16 * patch,
        in_channels=channels,
        num_classes=classes,
        label_dropout=dropout,
        patch_size=patch,
        hidden_size=width,
        depth=read_depth(state),
        num_heads=read_heads(state, width, known),
        encoder_depth=known.encoder_depth,
    )
    return with_labels(OfficialDDT(config), null_row)


_GROUPS = ("x_embedder", "s_embedder", "t_embedder", "y_embedder", "final_layer", "blocks")
_IN_BLOCK = ("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.proj", "norm2", "mlp", "adaLN_modulation")
FAMILY = Family(DDT, _GROUPS, _empty, lambda model, state: state, _IN_BLOCK)
