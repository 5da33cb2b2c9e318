"""Targets of alignment: fields of the shards, or what frozen encoders make of the shards' images while training."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dit_fast.data import DatasetInfo
from dit_fast.encoders import FeatureEncoder, load_encoder
from dit_fast.errors import ConfigError
from dit_fast.models import Backbone

IMAGE = "image"
FEATURES = ("features",)  # read unless other fields, or encoders, are named


class Targets:
    """Patch tokens [N, T, Z] for a model's tokens, and class tokens [N, Z] where they are asked for.

    owner: name of the method. encoders: specs of `load_encoder`, which run on the model's device; none: the fields
    `stored` are read. class_token: the field beside the first of them, or None.

    features: names of the patch tokens in a batch, one for each encoder, and class_token: that of the first one's class
    tokens. widths: of each. fields: what is read from the shards. digests: of the encoders' weights.
    Raises DataError for a field that the shards do not have, ConfigError for another number of tokens than the model's
    and for an encoder that has no class token, and what `load_encoder` raises.
    """

    def __init__(
        self,
        owner: str,
        encoders: Sequence[str],
        stored: Sequence[str],
        class_token: str | None,
        model: Backbone,
        data: DatasetInfo,
    ):
        self.encoders: list[FeatureEncoder] = []
        if encoders:
            if tuple(stored) != FEATURES:
                raise ConfigError(
                    f"methods.{owner}.fields={','.join(stored)} is not read beside methods.{owner}.encoders, which "
                    "make all targets; drop one of them"
                )
            data.field(IMAGE)
            self._load(owner, encoders, model)
            self.fields: tuple[str, ...] = (IMAGE,)
            self.features = tuple(f"{owner}.features_{number}" for number in range(len(encoders)))
            self.class_token = class_token and f"{owner}.class_token"
            shapes = [encoder.shapes(self._grid) for encoder in self.encoders]
            if class_token and "class_token" not in shapes[0]:
                raise ConfigError(f"methods.{owner}.encoders: {encoders[0]} has no class token; give another encoder")
            self.widths = [shape["features"][-1] for shape in shapes]
            self.class_width = shapes[0].get("class_token", (0,))[0]
        else:
            if not stored or len(set(stored)) < len(stored):
                raise ConfigError(f"methods.{owner}.fields={','.join(stored)}: give each field once, at least one")
            self.features, self.class_token = tuple(stored), class_token
            self.fields = (*stored, *([class_token] if class_token else []))
            self.widths = [_width(owner, name, data.field(name).shape, model) for name in stored]
            self.class_width = _class_width(owner, class_token, data.field(class_token).shape) if class_token else 0
        self.digests: Mapping[str, str] = {
            f"encoders.{number}": encoder.identity.rpartition(":")[2] for number, encoder in enumerate(self.encoders)
        }

    def _load(self, owner: str, specs: Sequence[str], model: Backbone) -> None:
        rows, columns = model.grid
        if rows != columns:
            raise ConfigError(
                f"methods.{owner}.encoders: the model has {rows} x {columns} tokens, an encoder gives a square; use "
                "square latents"
            )
        self._grid, device = rows, next(model.parameters()).device
        for spec in specs:
            encoder = load_encoder(spec)
            self.encoders.append(encoder if device.type == "meta" else encoder.to(device))

    def compute(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What of them a batch does not hold, by name; without gradients, in autocast where the caller is."""
        if not self.encoders:
            return {}
        images, made = pixels(batch), {}
        for number, (name, encoder) in enumerate(zip(self.features, self.encoders, strict=True)):
            given = encoder(images, self._grid)
            made[name] = given["features"]
            if self.class_token and number == 0:
                made[self.class_token] = given["class_token"]
        return made

    def release(self) -> None:
        """Frees the encoders; nothing can be computed any more."""
        self.encoders = []


def pixels(batch: Mapping[str, Tensor]) -> Tensor:
    """The batch's images as encoders take them: float32 [N, 3, S, S] in [-1, 1]."""
    return batch[IMAGE].float() / 127.5 - 1


def _class_width(owner: str, name: str, shape: tuple[int, ...]) -> int:
    if len(shape) != 1:
        raise ConfigError(
            f"methods.{owner}.class_token_field: '{name}' holds {list(shape)} per image, not a token [Z]; name another"
        )
    return shape[0]


def _width(owner: str, name: str, shape: tuple[int, ...], model: Backbone) -> int:
    """Of a field of tokens, one for each of the model's."""
    if len(shape) != 2:
        raise ConfigError(
            f"methods.{owner}.fields: '{name}' holds {list(shape)} per image, not tokens [T, Z]; name another"
        )
    if shape[0] != model.num_tokens:
        raise ConfigError(
            f"{owner}: the shards hold {shape[0]} feature tokens per image and the model has {model.num_tokens} "
            "tokens; use a patch size or an encoder grid that agree"
        )
    return shape[1]
