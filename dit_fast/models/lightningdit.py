"""LightningDiT (arXiv 2501.01423): SiT with RMSNorm, rotary positions and SwiGLU."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from dit_fast.models.base import PRESETS
from dit_fast.models.sit import SiT
from dit_fast.nn.block import Block
from dit_fast.nn.final_layer import FinalLayer
from dit_fast.nn.mlp import Mlp, SwiGLU
from dit_fast.nn.rotary import Rotary, RotaryTables, axial_rotary
from dit_fast.options import setting

# hidden_size, depth, num_heads, as published; Nano is ours, for CPUs.
_WIDTHS = {
    "Nano": (160, 6, 5),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
    "1p0B": (1536, 24, 24),
    "1p6B": (1792, 28, 28),
}
PRESETS.update(
    {
        f"LightningDiT-{size}/{patch}": {"hidden_size": width, "depth": depth, "num_heads": heads, "patch_size": patch}
        for size, (width, depth, heads) in _WIDTHS.items()
        for patch in (1, 2)
    }
)


class LightningDiT(SiT):
    """Velocity of a diffusion transformer with the parts of today's language models; see `LightningDiT.Config`.

    All else is SiT's: fixed sine-cosine positions beside the rotary ones, long skips, class token, two times. A class
    token is not turned. Without any of its parts (norm=layer, mlp=gelu, rope=false) it is SiT.
    Raises ConfigError as SiT does, and for rotary positions in heads whose width is not a multiple of 4.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(SiT.Config):
        """The transformer with a modern block."""

        name: str = setting("LightningDiT-XL/1", "Size and patch: LightningDiT-{Nano, B, L, XL, 1p0B, 1p6B}/{1, 2}")
        norm: Literal["rms", "layer"] = setting("rms", "RMSNorm or LayerNorm, of queries and keys (qk_norm) too")
        mlp: Literal["swiglu", "gelu"] = setting("swiglu", "MLP of the blocks")
        rope: bool = setting(True, "Rotary positions of rows and columns")
        adaln_shift: bool = setting(True, "Shift the blocks' normalised tokens by the condition, beside scaling them")

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        if config.rope:
            head_width = self.hidden_size // self.num_heads
            leading = 1 if self.class_token else 0
            self.feat_rope = RotaryTables(partial(axial_rotary, head_width, self.grid, leading))

    def new_block(self) -> Block:
        config, mlp = self.config, SwiGLU if self.config.mlp == "swiglu" else Mlp
        return Block(
            config.hidden_size,
            config.num_heads,
            config.qk_norm,
            config.attention,
            norm=config.norm,
            mlp=mlp,
            shift=config.adaln_shift,
        )

    def new_head(self, channels: int) -> FinalLayer:
        config = self.config
        return FinalLayer(config.hidden_size, config.patch_size, channels, config.class_token, config.norm)

    def rotary(self, index: int) -> Rotary | None:
        return self.feat_rope() if self.config.rope else None
