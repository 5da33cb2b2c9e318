"""SRA 2 (arXiv 2601.17830): a head on a shallow block predicts the clean latent itself; no teacher and no encoder.

No code of it is public, and the paper could be read only through others' notes: docs/methods/sra2.md says what is sure.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_fast.data import DatasetInfo
from dit_fast.errors import UserError
from dit_fast.methods.base import Method, Term
from dit_fast.models import Backbone
from dit_fast.nn.embeddings import patches
from dit_fast.nn.projector import projector
from dit_fast.objectives import Context
from dit_fast.options import check_choice, setting
from dit_fast.tree import image

Reduction = Literal["mean", "sum"]
BETA = 0.05  # where the smooth L1 distance turns from squares to absolute values
LAYERS = 5  # of the head


def sra2_loss(
    tokens: Tensor, x: Tensor, patch_size: int, beta: float = BETA, reduction: Reduction | str = "mean"
) -> Tensor:
    """Smooth L1 distance of tokens [N, T, p * p * C], channel fastest, to the patches of x [N, C, H, W]; 0-d.

    d^2 / (2 beta) where |d| <= beta, else |d| - beta / 2, in at least float32; the "mean" over everything, or the "sum"
    over a sample and the mean over samples. x gets no gradient. Raises UserError for shapes that do not fit, an unknown
    reduction and a beta that is not positive.
    """
    check_choice("reduction", reduction, Reduction)
    if not 0 < beta < math.inf:
        raise UserError(f"sra2_loss: beta={beta} must be a positive number")
    target = patches(x.detach(), patch_size)
    if tokens.shape != target.shape:
        raise UserError(
            f"sra2_loss: tokens are {list(tokens.shape)}, and x {list(x.shape)} has patches {list(target.shape)}"
        )
    wide = torch.promote_types(torch.promote_types(tokens.dtype, x.dtype), torch.float32)
    loss = F.smooth_l1_loss(tokens.to(wide), target.to(wide), beta=beta, reduction=str(reduction))
    return loss if reduction == "mean" else loss / len(tokens)


class SRA2(Method):
    """The distance of one block's head to the clean latents; the head lies in the model as `sra2_head`."""

    name = "sra2"
    title = "SRA 2"
    about = "a head on a shallow block predicts the clean latent"

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Which block predicts (published: 2 for B, 8 for L and XL), by what head, and how much it counts."""

        name: ClassVar[str] = "sra2"
        depth: int = setting(8, "Block with the head, from 1", "[1, 1000]")
        head_width: int = setting(0, "Hidden width of the head; 0 = twice the model's", "[0, 65536]")
        beta: float = setting(BETA, "Difference up to which the distance is quadratic", "(0, 1e6]")
        reduction: Reduction = setting("mean", "Over a sample: mean, or sum as the paper's formula reads")
        weight: float = setting(1.0, "Weight of the term", "[0, 1e6]")

    def __init__(self, config: Any, model: Backbone, data: DatasetInfo):
        """Adds the head. Raises ConfigError for a block that the model does not have."""
        super().__init__(config, model, data)
        self.block = model.block(config.depth, "methods.sra2.depth")
        self.blocks = frozenset({self.block})
        channels, height, width = model.shapes["image"]
        self.patch_size = height // model.grid[0]
        size = channels * height * width // model.num_tokens
        self.head = projector(model.hidden_size, config.head_width or 2 * model.hidden_size, size, LAYERS)
        model.add_head("sra2_head", self.head)

    def terms(self, context: Context) -> dict[str, Term]:
        tokens = self.head(context.features[self.block][:, -context.model.num_tokens :])  # without a class token
        loss = sra2_loss(tokens, image(context.x), self.patch_size, self.config.beta, self.config.reduction)
        return {"sra2/distance": Term(loss, self.config.weight)}
