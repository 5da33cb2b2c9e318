"""REPA (arXiv 2410.06940): one block's tokens, projected, are aligned with features of pretrained encoders.

The targets are read from the shards, where they were written next to the latents, or made of the shards' images.
Options of iREPA (arXiv 2512.10794): a convolution as projector, targets normalised over the tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dit_fast.data import DatasetInfo
from dit_fast.methods.base import Method, Term
from dit_fast.methods.irepa import spatial_normalize
from dit_fast.methods.targets import FEATURES, Targets
from dit_fast.models import Backbone
from dit_fast.nn.projector import ConvProjector, projector
from dit_fast.objectives import Context
from dit_fast.ops import repa_cosine
from dit_fast.options import setting


def repa_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Minus the mean cosine over samples and tokens of prediction and target [N, T, Z]; 0-d, in at least float32.

    The target gets no gradient. Raises UserError for shapes that differ. Source: REPA, Eq. 8.
    """
    return repa_cosine(prediction, target.detach())


class Alignment(Method):
    """A projector for each encoder on one block; they are among the model's `projectors`, and so in the checkpoints."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Which block is aligned, with what, and how much it counts."""

        name: ClassVar[str]
        encoder_depth: int = setting(8, "Aligned block, from 1 (published: 8 for L and XL, 4 or 5 for B)", "[1, 1000]")
        projector_width: int = setting(2048, "Hidden width of the projector, a convolution apart", "[1, 65536]")
        weight: float = setting(0.5, "Weight of the term", "[0, 1e6]")
        fields: tuple[str, ...] = setting(FEATURES, "Fields of the shards with the targets, one for each encoder")
        encoders: tuple[str, ...] = setting(
            (), "Encoders (KIND-vit-SIZE:PATH, ...) that make targets of the shards' images; none: `fields`", "", True
        )

    def bind(self, model: Backbone, data: DatasetInfo, class_token: str | None) -> None:
        """Opens the targets and adds a projector for each. Raises as `Targets` does."""
        config = self.config
        self.block = model.block(config.encoder_depth, f"methods.{self.name}.encoder_depth")
        self.blocks = frozenset({self.block})
        self.targets = Targets(self.name, config.encoders, config.fields, class_token, model, data)
        self.fields, self.digests = self.targets.fields, self.targets.digests
        self.heads = [self.head(model, width) for width in self.targets.widths]
        for head in self.heads:
            model.add_projector(head)

    def head(self, model: Backbone, width: int) -> torch.nn.Module:
        """A projector to targets of this width."""
        return projector(model.hidden_size, self.config.projector_width, width)

    def complete(self, batch: Mapping[str, Tensor], active: bool) -> Mapping[str, Tensor]:
        return self.targets.compute(batch) if active else {}

    def release(self) -> None:
        self.targets.release()

    def aligned(self, losses: list[Tensor]) -> Term:
        """Their mean; where there are several, each is logged."""
        if len(losses) == 1:
            return Term(losses[0], self.config.weight)
        logs = {f"{self.name}/alignment_{number}": loss for number, loss in enumerate(losses)}
        return Term(torch.stack(losses).mean(), self.config.weight, logs)


class REPA(Alignment):
    """Alignment term over the patch tokens."""

    name = "repa"
    title = "REPA"
    about = "one block is aligned with the features of a frozen image encoder"
    fields: tuple[str, ...] = ("features",)

    @dataclass(frozen=True, kw_only=True)
    class Config(Alignment.Config):
        """Which block is aligned, with what, by what head, and how much it counts."""

        name: ClassVar[str] = "repa"
        projector: Literal["mlp", "conv"] = setting(
            "mlp", "mlp: three linear layers; conv: one 3 x 3 convolution (iREPA)"
        )
        spatial_norm: float | None = setting(
            None, "Share of their mean over tokens that targets lose, then divided by their deviation (iREPA: 0.6)",
            "[0, 1]",
        )  # fmt: skip

    def __init__(self, config: Any, model: Backbone, data: DatasetInfo):
        """Adds the projectors. Raises DataError where the shards hold no targets, ConfigError unless one a token."""
        super().__init__(config, model, data)
        self.bind(model, data, class_token=None)

    def head(self, model: Backbone, width: int) -> torch.nn.Module:
        if self.config.projector == "conv":
            return ConvProjector(model.hidden_size, width, model.grid)
        return super().head(model, width)

    def terms(self, context: Context) -> dict[str, Term]:
        feature, losses, strength = context.features[self.block], [], self.config.spatial_norm
        for head, name in zip(self.heads, self.targets.features, strict=True):
            target = context.batch[name]
            prediction = head(feature[:, feature.shape[1] - target.shape[1] :])  # without a class token
            losses.append(repa_loss(prediction, target if strength is None else spatial_normalize(target, strength)))
        return {"repa/alignment": self.aligned(losses)}
