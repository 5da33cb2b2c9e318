"""REPA (arXiv 2410.06940): one block's tokens, projected, are aligned with features of a pretrained encoder.

The targets are read from the shards (field "features"), where they were written next to the latents.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dit_fast.data import DatasetInfo
from dit_fast.errors import ConfigError
from dit_fast.methods.base import Method, Term
from dit_fast.models import Backbone
from dit_fast.nn.projector import projector
from dit_fast.objectives import Context
from dit_fast.ops import repa_cosine
from dit_fast.options import setting


def repa_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Minus the mean cosine over samples and tokens of prediction and target [N, T, Z]; 0-d, in at least float32.

    The target gets no gradient. Raises UserError for shapes that differ. Source: REPA, Eq. 8.
    """
    return repa_cosine(prediction, target.detach())


class REPA(Method):
    """Alignment term over the patch tokens; its head is one of the model's `projectors`, and so in the checkpoints."""

    name = "repa"
    fields: tuple[str, ...] = ("features",)

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Which block is aligned, by what head, and how much it counts."""

        name: ClassVar[str] = "repa"
        encoder_depth: int = setting(8, "Aligned block, from 1 (published: 8 for L and XL, 4 or 5 for B)", "[1, 1000]")
        projector_width: int = setting(2048, "Hidden width of the projector", "[1, 65536]")
        weight: float = setting(0.5, "Weight of the term", "[0, 1e6]")

    def __init__(self, config: Any, model: Backbone, data: DatasetInfo):
        """Adds the projector. Raises DataError where the shards hold no features, ConfigError unless one a token."""
        super().__init__(config, model, data)
        self.block = model.block(config.encoder_depth, f"methods.{self.name}.encoder_depth")
        self.blocks = frozenset({self.block})
        tokens, width = data.field("features").shape
        if tokens != model.num_tokens:
            raise ConfigError(
                f"{self.name}: the shards hold {tokens} feature tokens per image and the model has {model.num_tokens} "
                "tokens; use a patch size or an encoder grid that agree"
            )
        self.head = projector(model.hidden_size, config.projector_width, width)
        model.add_projector(self.head)

    def terms(self, context: Context) -> dict[str, Term]:
        target, feature = context.batch["features"], context.features[self.block]
        prediction = self.head(feature[:, feature.shape[1] - target.shape[1] :])  # without a class token
        return {"repa/alignment": Term(repa_loss(prediction, target), self.config.weight)}
