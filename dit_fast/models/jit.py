"""JiT, "just image transformers" (arXiv 2511.13720): SiT with a modern block, made for large patches of pixels."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from dit_fast.errors import ConfigError
from dit_fast.models.base import PRESETS, check_sizes
from dit_fast.models.sit import Residual, SiT
from dit_fast.nn.block import Block
from dit_fast.nn.embeddings import BottleneckPatchEmbed
from dit_fast.nn.final_layer import FinalLayer
from dit_fast.nn.mlp import SwiGLU
from dit_fast.nn.rotary import Rotary, RotaryTables, axial_rotary
from dit_fast.options import setting
from dit_fast.tree import Tree, label

_OWN = ("bottleneck", "in_context_len", "in_context_start")
# hidden_size, depth, num_heads, then those, as published (Tab. 9, code); Nano is ours, for CPUs.
_SIZES = {
    "Nano": (160, 6, 5, 32, 4, 2),
    "B": (768, 12, 12, 128, 32, 4),
    "L": (1024, 24, 16, 128, 32, 8),
    "H": (1280, 32, 16, 256, 32, 10),
}
PRESETS.update(
    {
        f"JiT-{size}/{patch}": dict(
            zip(("hidden_size", "depth", "num_heads", *_OWN, "patch_size"), (*sizes, patch), strict=True)
        )
        for size, sizes in _SIZES.items()
        for patch in ((2,) if size == "Nano" else (16, 32))
    }
)


class JiT(SiT):
    """Clean data (objective.prediction=x), or another prediction, of a diffusion transformer on pixels or latents.

    From block `in_context_start` on, `in_context_len` tokens that hold the label's embedding, each with a learned
    vector of its own, stand before the patches; rotary positions leave them as they are. They are this network's own
    affair: taps, queries and keys that are handed out, long skips and the head have the other tokens alone, so that a
    feature is [N, T, D] with the same T after every block. The network's time runs from noise to data, as published: it
    is shown 1 - t. All else is SiT's: long skips, class token (not turned either), two times.
    Raises ConfigError as SiT does, for a block that the tokens cannot come before, and for heads whose width is not a
    multiple of 4.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(SiT.Config):
        """The transformer for large patches; made for objective.prediction=x."""

        name: str = setting("JiT-B/16", "Size and patch: JiT-{B, L, H}/{16, 32}, or JiT-Nano/2")
        qk_norm: bool = setting(True, "Normalise queries and keys per head")
        bottleneck: int = setting(0, "Width of the first layer on a patch; 0 = as the name says", "[0, 65536]")
        in_context_len: int | None = setting(
            None, "Tokens of the label before the patches; none = as the name says", "[0, 65536]"
        )
        in_context_start: int | None = setting(
            None, "First block that has them, from 0; none = as the name says", "[0, 1000]"
        )

    config: Config

    def __init__(self, config: Config):
        named = PRESETS.get(config.name, {})
        length, start = (named.get(key) if (given := getattr(config, key)) is None else given for key in _OWN[1:])
        bottleneck = config.bottleneck or named.get("bottleneck", 0)
        config = dataclasses.replace(config, bottleneck=bottleneck, in_context_len=length, in_context_start=start)
        check_sizes(config, 1, "bottleneck")
        check_sizes(config, 0, "in_context_len", "in_context_start")
        super().__init__(config)
        self.in_context_len, self.in_context_start = cast(int, length), cast(int, start)
        if self.in_context_len and self.in_context_start >= self.depth:
            raise ConfigError(f"in_context_start={start} is not one of this model's blocks 0..{self.depth - 1}")
        if self.in_context_len:
            positions = torch.empty(1, self.in_context_len, self.hidden_size, dtype=torch.float32)
            self.in_context_posemb = nn.Parameter(positions.normal_(std=0.02))
        leading, head_width = self.in_context_len + bool(self.class_token), self.hidden_size // self.num_heads
        self.rope = RotaryTables(partial(axial_rotary, head_width, self.grid, leading), persistent=False)

    def new_patch_embed(self) -> Any:
        config = self.config
        return BottleneckPatchEmbed(config.in_channels, config.patch_size, config.bottleneck, config.hidden_size)

    def new_block(self) -> Block:
        config = self.config
        return Block(config.hidden_size, config.num_heads, config.qk_norm, config.attention, norm="rms", mlp=SwiGLU)

    def new_head(self, channels: int) -> FinalLayer:
        return FinalLayer(self.hidden_size, self.config.patch_size, channels, self.class_token, norm="rms")

    def rotary(self, index: int) -> Rotary | None:
        cos, sin = self.rope()
        missing = self.in_context_len - self.leading(index)
        return cos[missing:], sin[missing:]

    def network_time(self, t: Tensor) -> Tensor:
        return 1 - t

    def leading(self, index: int) -> int:
        return self.in_context_len if index >= self.in_context_start else 0

    def extended(self, index: int, stream: Residual, y: Tree) -> Residual:
        if not self.in_context_len or index != self.in_context_start:
            return stream
        context = self.y_embedder(label(y))[:, None] + self.in_context_posemb
        return Residual(torch.cat((context.to(stream.tokens.dtype), stream.tokens), dim=1))
