"""REPA (arXiv 2410.06940): one block's tokens, projected, are aligned with features of a pretrained encoder.

The targets are read from the shards (field "features"), where they were written next to the latents.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from dit_fast.errors import ConfigError
from dit_fast.methods.base import Method, ModelFacts, StepContext, Term
from dit_fast.nn.projector import projector
from dit_fast.ops import repa_cosine
from dit_fast.options import setting


def repa_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Minus the mean cosine over samples and tokens of prediction and target [N, T, Z]; 0-d, in at least float32.

    The target gets no gradient. Raises ConfigError for shapes that differ. Source: REPA, Eq. 8.
    """
    if prediction.shape != target.shape:
        raise ConfigError(
            f"repa_loss needs prediction and target of one shape [N, T, Z], "
            f"not {list(prediction.shape)} and {list(target.shape)}"
        )
    return repa_cosine(prediction, target.detach())


class REPA(Method):
    """Alignment term; its projector lies in the model as `projectors.0`, and so in the EMA and the checkpoints."""

    name = "repa"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Which block is aligned, by what head, and how much it counts."""

        name: ClassVar[str] = "repa"
        encoder_depth: int = setting(8, "Aligned block, from 1 (published: 8 for L and XL, 4 or 5 for B)", "[1, 1000]")
        projector_width: int = setting(2048, "Hidden width of the projector", "[1, 65536]")
        weight: float = setting(0.5, "Weight of the term", "[0, 1e6]")

    def batch_fields(self) -> tuple[str, ...]:
        return ("features",)

    def taps(self, facts: ModelFacts) -> frozenset[int]:
        depth = self.config.encoder_depth
        if not 1 <= depth <= facts.depth:
            raise ConfigError(f"repa.encoder_depth={depth} is not one of this model's blocks 1..{facts.depth}")
        return frozenset({depth - 1})

    def attach(self, model: Any, dataset_info: Any) -> None:
        """Adds the projector. Raises DataError where the shards hold no features, ConfigError unless one a token."""
        tokens, width = dataset_info.field("features").shape
        facts = ModelFacts.of(model)
        if tokens != facts.num_tokens:
            raise ConfigError(
                f"repa: the shards hold {tokens} feature tokens per image and the model has {facts.num_tokens} tokens; "
                "use a patch size or an encoder grid that agree"
            )
        head = projector(facts.hidden_size, self.config.projector_width, width)
        model.add_head("projectors", nn.ModuleList([head]))

    def terms(self, context: StepContext) -> dict[str, Term]:
        projectors: Any = context.model.projectors
        prediction = projectors[0](context.features[self.config.encoder_depth - 1])
        return {"repa/alignment": Term(repa_loss(prediction, context.batch["features"]), self.config.weight)}
