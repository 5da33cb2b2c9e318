"""REG (arXiv 2507.01467): an encoder's class token is noised and denoised beside the image, and all tokens are aligned.

The model has one more token (`model.class_token` is its width); the sampler starts both from noise. The token's clean
value and the targets of the alignment are read from the shards, or made of their images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dit_fast.data import DatasetInfo
from dit_fast.diffusion import Path, velocity_error
from dit_fast.diffusion.checks import check_batch
from dit_fast.diffusion.paths import as_path
from dit_fast.errors import ConfigError
from dit_fast.methods.base import Term
from dit_fast.methods.repa import Alignment, repa_loss
from dit_fast.models import Backbone, split
from dit_fast.objectives import Context
from dit_fast.ops.draws import Key
from dit_fast.options import setting
from dit_fast.tree import Tree, leaves


class REGLosses(NamedTuple):
    """flow, class_token: mean squared error of the velocity of the image and of the token, [N]. alignment: 0-d."""

    flow: Tensor
    class_token: Tensor
    alignment: Tensor


def reg_losses(
    model: Any,
    x: Tensor,
    y: Tensor,
    t: Tensor,
    noise: Tensor,
    class_noise: Tensor,
    target: Tensor,
    encoder_depth: int,
    path: Path | str = "linear",
) -> REGLosses:
    """The three losses; the published total is flow + 0.03 class_token + 0.5 alignment, each averaged over the batch.

    model: with a class token and `projectors`. x, noise [N, C, H, W]; y [N] int64; t [N]; class_noise [N, Z]; target
    [N, 1 + T, Z]: the encoder's class token, then its patch tokens; it gets no gradient. encoder_depth: the aligned
    block, from 1. Source: REG, Eqs. 4 to 7; token and image share t and have noise of their own. Raises UserError for
    shapes and a model that do not fit.
    """
    if not hasattr(model, "projectors"):
        raise ConfigError("reg_losses needs a model with its alignment head, `projectors`; `load_official` gives one")
    check_batch(model, x, y, t, path)
    path, block, target = as_path(path), model.block(encoder_depth, "encoder_depth"), target.detach()
    noised, velocity = path.interpolate(x, noise, t)
    noised_token, token_velocity = path.interpolate(target[:, 0], class_noise, t)
    whole, features = model({"image": noised, "class_token": noised_token}, t, y, taps=(block,))
    output, _ = split(whole)
    return REGLosses(
        velocity_error(output["image"], velocity),
        velocity_error(output["class_token"], token_velocity),
        repa_loss(model.projectors[0](features[block]), target),
    )


class REG(Alignment):
    """The alignment of REPA, of the class token too, and the token's flow matching."""

    name = "reg"
    title = "REG"
    about = "a frozen encoder's class token is denoised beside the image, and one block is aligned with its features"
    fields: tuple[str, ...] = ("features", "class_token")
    adds = ("class_token",)

    @dataclass(frozen=True, kw_only=True)
    class Config(Alignment.Config):
        """Which block is aligned, with what, and how much the two terms count (published blocks: 8; 4 for B)."""

        name: ClassVar[str] = "reg"
        class_token_field: str = setting("class_token", "Field of the shards with the class token, beside `fields`")
        class_token_weight: float = setting(0.03, "Weight of the class token's flow matching", "[0, 1e6]")

    def __init__(self, config: Any, model: Backbone, data: DatasetInfo):
        """Raises ConfigError where the model has no class token, or one of another width than the encoder's."""
        super().__init__(config, model, data)
        if max(len(config.fields), len(config.encoders)) > 1:
            raise ConfigError(
                "reg denoises the class token of one encoder; give methods.reg.fields or encoders one entry"
            )
        if config.encoders and config.class_token_field != "class_token":
            raise ConfigError(
                f"methods.reg.class_token_field={config.class_token_field} is not read beside methods.reg.encoders, "
                "which make all targets; drop one of them"
            )
        self.bind(model, data, config.class_token_field)
        width, (aligned,) = self.targets.class_width, self.targets.widths
        if model.class_token != width:
            where = config.encoders[0] if config.encoders else "the shards"
            raise ConfigError(f"reg: class tokens of {where} have the width {width}; set model.class_token={width}")
        if aligned != width:
            raise ConfigError(f"reg: class tokens of width {width} and features of width {aligned}: give one encoder's")
        self._token, (self._features,) = str(self.targets.class_token), self.targets.features

    def complete(self, batch: Mapping[str, Tensor], active: bool) -> Mapping[str, Tensor]:
        return self.targets.compute(batch)  # the class token is denoised for ever

    def release(self) -> None:
        pass

    def state(self, x: Tree, batch: Mapping[str, Tensor], key: Key) -> Tree:
        return {**leaves(x), "class_token": batch[self._token]}

    def terms(self, context: Context) -> dict[str, Term]:
        target = torch.cat((context.batch[self._token][:, None], context.batch[self._features]), 1)
        (head,) = self.heads
        aligned = repa_loss(head(context.features[self.block]), target)
        return {**self.lasting_terms(context), "reg/alignment": self.aligned([aligned])}

    def lasting_terms(self, context: Context) -> dict[str, Term]:
        """The class token's, which stays beside the image."""
        return {"reg/class_token": Term(context.losses["class_token"].mean(), self.config.class_token_weight)}
