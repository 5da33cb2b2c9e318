"""DDT (arXiv 2504.05741): an encoder of what conditions every token, and a decoder of the velocity."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit_fast.errors import ConfigError
from dit_fast.models.base import PRESETS, Backbone, Output, Taps, check_sizes
from dit_fast.models.recompute import recomputed
from dit_fast.nn.block import Block
from dit_fast.nn.embeddings import LabelEmbedder, TimestepEmbedder
from dit_fast.nn.final_layer import FinalLayer
from dit_fast.nn.linear import linear_flops, xavier_linear, zero_linear
from dit_fast.nn.mlp import SeparateSwiGLU
from dit_fast.nn.rotary import Rotary, RotaryTables, interleaved_rotary
from dit_fast.ops import RowStatistics
from dit_fast.ops.autocast import autocast_dtype
from dit_fast.options import nearest, setting, shown
from dit_fast.tree import Tree, image, label

_SIZES = ("patch_size", "hidden_size", "depth", "num_heads", "encoder_depth")
# hidden_size, depth, num_heads, encoder_depth, as published (Tab. 2); Nano is ours, for CPUs.
_WIDTHS = {
    "Nano": (160, 6, 5, 4),
    "B": (768, 12, 12, 8),
    "L": (1024, 24, 16, 20),
    "XL": (1152, 28, 16, 22),
}
PRESETS.update({f"DDT-{size}/2": dict(zip(_SIZES, (2, *sizes), strict=True)) for size, sizes in _WIDTHS.items()})
TIME_BASE = 10.0


class Patches(nn.Module):
    """Patches [N, T, C * p * p] to tokens [N, T, D]."""

    def __init__(self, features: int, hidden_size: int):
        super().__init__()
        self.proj = xavier_linear(features, hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(patches)


class DDT(Backbone):
    """Velocity of a decoupled diffusion transformer; its configuration is `DDT.Config`.

    The first `encoder_depth` blocks read the noised image, conditioned on time and label, and end in a condition for
    each token (`encode`); the others read the noised image anew, modulated by that alone (`decode`), so that a sampler
    may keep a condition for several steps (`sample(state_refresh=)`). Blocks count on from the encoder to the decoder,
    and so do taps. The network's time runs from noise to data, as published: it is shown 1 - t, and its output changes
    sign. Long skips would tie the decoder to the encoder's streams: there are none.
    Raises ConfigError for a size that is not given (0), for a class token, two times, and what else does not fit.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Backbone.Config):
        """The transformer of an encoder and a decoder."""

        name: str = setting("DDT-XL/2", "Size and patch size: DDT-{Nano, B, L, XL}/2")
        attention: Literal["auto", "sdpa", "flash", "math"] = setting(
            "auto", "Implementation of attention", resumes=True
        )
        residual_dtype: Literal["fp32", "autocast"] = setting(
            "autocast", "Stream under engine.precision=bf16; autocast: bf16, as published"
        )
        patch_size: int = setting(0, "Patch height = width; 0 = as the name says", "[0, 4096]")
        hidden_size: int = setting(0, "Width of the tokens; 0 = as the name says", "[0, 65536]")
        depth: int = setting(0, "Blocks, of both parts; 0 = as the name says", "[0, 1000]")
        num_heads: int = setting(0, "Attention heads; 0 = as the name says", "[0, 65536]")
        encoder_depth: int = setting(0, "Blocks of the encoder; 0 = as the name says", "[0, 1000]")

        def __post_init__(self) -> None:
            if self.name not in PRESETS and not all(getattr(self, size) for size in _SIZES):
                raise ConfigError(
                    f"unknown model {shown(self.name)}{nearest(self.name, PRESETS)} (or set all of {', '.join(_SIZES)})"
                )

    config: Config
    guides_noise = False

    def __init__(self, config: Config):
        sizes = PRESETS.get(config.name, {})
        named: dict[str, Any] = {key: getattr(config, key) or sizes.get(key, 0) for key in _SIZES}
        super().__init__(config := dataclasses.replace(config, **named))
        check_sizes(config, 1, *_SIZES)
        if config.class_token or config.times != 1:
            key = "class_token=0" if config.class_token else "times=1"
            raise ConfigError(f"DDT denoises an image alone, at one time; set model.{key}, or another model")
        if not config.encoder_depth < config.depth:
            raise ConfigError(
                f"encoder_depth={config.encoder_depth} leaves the decoder none of {config.depth} blocks; lower it"
            )
        self.hidden_size, self.depth, self.num_heads = config.hidden_size, config.depth, config.num_heads
        self.encoder_depth = config.encoder_depth
        width, features = config.hidden_size, config.in_channels * config.patch_size**2
        self.place(config)
        self.x_embedder, self.s_embedder = Patches(features, width), Patches(features, width)
        self.t_embedder = TimestepEmbedder(width, TIME_BASE)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.blocks = nn.ModuleList(self._new_block() for _ in range(config.depth))
        for module in self.blocks.modules():  # as published: torch's own initial values, and gates that are open
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        self.final_layer = FinalLayer(width, config.patch_size, config.in_channels, modulation=_modulation(zero_linear))

    def _new_block(self) -> Block:
        config = self.config
        return Block(
            config.hidden_size,
            config.num_heads,
            qk_norm=True,
            attention=config.attention,
            norm="rms",
            mlp=SeparateSwiGLU,
            qkv_bias=False,
            modulation=_modulation(nn.Linear),
        )

    def place(self, config: Config) -> None:
        """Takes over the sizes of the image. Raises ConfigError where patches do not fill it."""
        height, width = config.input_size, config.input_width or config.input_size
        for name, size in (("input_size", height), ("input_width", width)):
            if size % config.patch_size:
                raise ConfigError(f"{name} {size} must be a multiple of patch_size {config.patch_size}")
        self.config, self.in_channels = config, config.in_channels
        self.shapes = {"image": (config.in_channels, height, width)}
        self.grid = (height // config.patch_size, width // config.patch_size)
        self.num_tokens = self.grid[0] * self.grid[1]
        tables = partial(interleaved_rotary, config.hidden_size // config.num_heads, self.grid)
        self.rope = RotaryTables(tables, persistent=False)

    def compute(self, x: Tree, t: Tensor, y: Tree, taps: Taps, stop: int | None) -> Output | None:
        condition = self._encoded(image(x), t, label(y), taps, stop)
        return None if condition is None else self._decoded(image(x), condition, taps, stop)

    def encode(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The decoder's condition [N, T, D] of x [N, C, H, W], t [N], y int64 [N]. Raises UserError for bad input."""
        self._check(x, t, y)
        return cast(Tensor, self._encoded(x, t, y, Taps(), None))

    def decode(self, x: Tensor, condition: Tensor) -> Tensor:
        """The velocity, like x; `encode` of the same x, t and y before makes it the output of the model."""
        return cast(Tensor, self._decoded(x, condition, Taps(), None))

    def _encoded(self, x: Tensor, t: Tensor, y: Tensor, taps: Taps, stop: int | None) -> Tensor | None:
        time = self.t_embedder(1 - t)
        last = self.depth - 1 if stop is None else stop
        blocks = range(min(self.encoder_depth, last + 1))
        tokens = self._through(blocks, self.s_embedder(self._patches(x)), F.silu(time + self.y_embedder(y)), taps)
        return F.silu(time[:, None] + tokens) if last >= self.encoder_depth else None

    def _decoded(self, x: Tensor, condition: Tensor, taps: Taps, stop: int | None) -> Tensor | None:
        blocks = range(self.encoder_depth, self.depth if stop is None else stop + 1)
        tokens = self._through(blocks, self.x_embedder(self._patches(x)), condition, taps)
        return None if stop is not None else -self._image(self.final_layer(tokens, condition))

    def _through(self, blocks: range, tokens: Tensor, condition: Tensor, taps: Taps) -> Tensor:
        if self.config.residual_dtype == "fp32" and autocast_dtype(tokens) is not None:
            tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        stats: RowStatistics | None = None
        rotary: Rotary = self.rope()
        for index in blocks:
            given = (tokens, condition, stats, rotary, index in taps.attention)
            tokens, stats, *heads = recomputed(self.activation_checkpointing, self.blocks[index], *given)
            if heads:
                taps.heads[index] = heads[0]
            if index in taps:
                tokens = taps(index, tokens, stats)
        return tokens

    def _patches(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, T, C * p * p], pixels of a patch fastest."""
        patch, (rows, columns) = self.config.patch_size, self.grid
        cut = x.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _image(self, patches: Tensor) -> Tensor:
        """The inverse of `_patches`."""
        patch, (rows, columns) = self.config.patch_size, self.grid
        cut = patches.unflatten(2, (-1, patch, patch)).unflatten(1, (rows, columns))
        return cut.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def beyond(self, last: int) -> list[nn.Module]:
        return [*super().beyond(last), *[self.x_embedder] * (last < self.encoder_depth)]

    def flops_per_sample(self) -> int:
        tokens = self.num_tokens
        total = sum(linear_flops(embedder.proj, tokens) for embedder in (self.x_embedder, self.s_embedder))
        for index, block in enumerate(self.blocks):
            total += cast(Block, block).flops(tokens, 1 if index < self.encoder_depth else tokens)
        return total + self.t_embedder.flops() + self.final_layer.flops(tokens, tokens)


def _modulation(linear: Any) -> Any:
    """Of a condition that has passed its SiLU; `linear` makes the layer."""
    return lambda width, parts: nn.Sequential(linear(width, parts * width))
