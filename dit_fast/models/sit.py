"""SiT: the transformer of SiT (arXiv 2401.08740), REPA (2410.06940) and, with long skips, DiverseDiT (2603.04239)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from dit_fast.errors import ConfigError
from dit_fast.models.base import GUIDANCE, PRESETS, Backbone, Output, Taps, check_sizes, guidance_conditions
from dit_fast.models.recompute import recomputed
from dit_fast.nn.attention import Heads
from dit_fast.nn.block import Block
from dit_fast.nn.embeddings import LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_position_embedding
from dit_fast.nn.final_layer import FinalLayer
from dit_fast.nn.linear import Reads, linear_flops, xavier_linear
from dit_fast.nn.long_skip import SkipLinear, SkipNorm
from dit_fast.nn.rotary import Rotary
from dit_fast.ops import RowStatistics
from dit_fast.ops.autocast import linear_dtype
from dit_fast.ops.linear import linear_of_all
from dit_fast.ops.row_statistics import statistics_by_kernel
from dit_fast.options import nearest, setting, shown
from dit_fast.tree import Tree, image, label

# hidden_size, depth, num_heads (DiT, arXiv 2212.09748, Tab. 1); Nano is ours, for CPUs.
_WIDTHS = {
    "Nano": (160, 6, 5),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


def presets(model: str) -> dict[str, dict[str, int]]:
    """Sizes by name of a model with these widths: "SiT-XL/2", ..."""
    return {
        f"{model}-{size}/{patch}": {"hidden_size": width, "depth": depth, "num_heads": heads, "patch_size": patch}
        for size, (width, depth, heads) in _WIDTHS.items()
        for patch in ((2,) if size == "Nano" else (2, 4, 8))
    }


PRESETS.update(presets("SiT"))


Modulations = Mapping[nn.Module, tuple[Tensor, ...]]  # the parts of a block's or head's modulation, where known


class Residual(NamedTuple):
    """Tokens [N, T, D] between two blocks, their row statistics if the op that wrote them returned any, and queries
    and keys of the block that they come from if those were asked for."""

    tokens: Tensor
    stats: RowStatistics | None = None
    heads: Heads | None = None

    def after(self, leading: int) -> "Residual":
        """Without the first tokens."""
        if not leading:
            return self
        stats = self.stats and RowStatistics(*(part[:, leading:] for part in self.stats))
        return Residual(self.tokens[:, leading:], stats)

    def joined(self, leading: int, tokens: Tensor) -> Tensor:
        """Other tokens behind the first ones of these."""
        return torch.cat((self.tokens[:, :leading].to(tokens.dtype), tokens), dim=1) if leading else tokens


class SiT(Backbone):
    """Velocity of a diffusion transformer; its configuration is `SiT.Config`.

    skip_wiring: long residual connections between the two halves. "input" (paper, Eq. 8): before block b of the second
    half, the stream is fused with the input of block L-1-b. "output" (released code): after block b, it is fused with
    the output of block L-1-b. The parameters are the same for both: a checkpoint cannot tell them apart.
    residual_dtype: under autocast, "fp32" keeps the stream between the blocks in fp32; "autocast" leaves it in half
    precision from the first fusion on, as the released code does; "bf16" has all of it in half precision.
    label_dropout: share of labels that the trainer replaces by the null label; with 0 that is never trained, so
    `null_label` is -1 and samplers refuse guidance. attention: see `dit_fast.nn.attention.Attention`.
    class_token: the output is a velocity of it, too (REG, arXiv 2507.01467). times=2: a mean velocity between two times
    (mean flow, 2505.13447), which an embedder of t - r tells. auxiliary_depth: a second output, like x, from a head of
    its own, `final_layer_xr`, on the output of that block, counted from 1 (internal guidance, 2512.24176); 0 = none.
    velocity_head: a second output, like x, from a head of its own, `final_layer_v`, on the last block: the velocity at
    t beside the mean one. guidance_condition: embedders of 1 - 1/omega, t_min and t_max, by which it is told the
    guidance of its target (both: improved mean flow, 2512.02012).
    Parameter names and their order are those of the published code.
    Raises ConfigError for a size that is not given (0) and for a combination that cannot run.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Backbone.Config):
        """The transformer."""

        name: str = setting("SiT-XL/2", "Size and patch size: SiT-Nano/2 or SiT-{S, B, L, XL}/{2, 4, 8}")
        skip_wiring: Literal["off", "input", "output"] = setting(
            "off", "Long skips: none, as in the paper, as published"
        )
        qk_norm: bool = setting(False, "Normalise queries and keys per head")
        residual_dtype: Literal["fp32", "autocast", "bf16"] = setting(
            "fp32", "Stream under engine.precision=bf16; autocast: bf16 from the first long skip on, as published"
        )
        attention: Literal["auto", "sdpa", "flash", "math"] = setting(
            "auto", "Implementation of attention", resumes=True
        )
        patch_size: int = setting(0, "Patch height = width; 0 = as the name says", "[0, 4096]")
        hidden_size: int = setting(0, "Width of the tokens; 0 = as the name says", "[0, 65536]")
        depth: int = setting(0, "Blocks; 0 = as the name says", "[0, 1000]")
        num_heads: int = setting(0, "Attention heads; 0 = as the name says", "[0, 65536]")
        auxiliary_depth: int = setting(
            0, "Block, from 1, of a second head, for internal_guidance; 0 = none", "[0, 1000]"
        )
        velocity_head: bool = setting(False, "A second head, of the velocity at t, for improved_mean_flow")
        guidance_condition: bool = setting(
            False, "Tell the model its guidance and when it acts, for improved_mean_flow"
        )

        def __post_init__(self) -> None:
            if self.name not in PRESETS and not all(getattr(self, size) for size in _SIZES):
                raise ConfigError(
                    f"unknown model {shown(self.name)}{nearest(self.name, PRESETS)} (or set all of {', '.join(_SIZES)})"
                )

    config: Config

    def __init__(self, config: Config):
        sizes = PRESETS.get(config.name, {})
        named: dict[str, Any] = {key: getattr(config, key) or sizes.get(key, 0) for key in _SIZES}
        super().__init__(config := dataclasses.replace(config, **named))
        _check(config, self.shapes["image"])
        self.hidden_size, self.depth, self.num_heads = config.hidden_size, config.depth, config.num_heads
        _, height, width = self.shapes["image"]
        self.grid = (height // config.patch_size, width // config.patch_size)
        self.num_tokens = self.grid[0] * self.grid[1]

        width, depth = config.hidden_size, config.depth
        positions = sincos_position_embedding(width, self.grid)
        if config.class_token:
            positions = nn.functional.pad(positions, (0, 0, 1, 0))
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        if config.skip_wiring != "off":
            self.skip_linears = nn.ModuleList(SkipLinear(width) for _ in range(depth // 2))
            self.skip_norms = nn.ModuleList(SkipNorm(width) for _ in range(depth // 2))
        self.x_embedder = self.new_patch_embed()
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.blocks = nn.ModuleList(self.new_block() for _ in range(depth))
        if config.auxiliary_depth:
            self.outputs = 2
            self.final_layer_xr = self.new_head(config.in_channels)
        if config.velocity_head:
            self.outputs = 2
            self.final_layer_v = self.new_head(config.in_channels)
        self.final_layer = self.new_head(config.in_channels * (2 if self.learns_variance else 1))
        if config.class_token:
            self.cls_projectors2 = xavier_linear(config.class_token, width)
            self.wg_norm = nn.LayerNorm(width, eps=1e-6)
        if config.times == 2:
            self.r_embedder = TimestepEmbedder(width)
        self.guidance_condition = config.guidance_condition
        if config.guidance_condition:
            self.omega_embedder = TimestepEmbedder(width)
            self.t_min_embedder = TimestepEmbedder(width)
            self.t_max_embedder = TimestepEmbedder(width)

    def new_patch_embed(self) -> Any:
        return PatchEmbed(self.config.in_channels, self.config.patch_size, self.config.hidden_size)

    def new_block(self) -> Block:
        config = self.config
        return Block(config.hidden_size, config.num_heads, config.qk_norm, config.attention)

    def new_head(self, channels: int) -> FinalLayer:
        """channels: of its output's image."""
        return FinalLayer(self.config.hidden_size, self.config.patch_size, channels, self.config.class_token)

    def rotary(self, index: int) -> Rotary | None:
        """What turns queries and keys of a block; None here."""
        return None

    def network_time(self, t: Tensor) -> Tensor:
        """The time [N] that the network is shown for our t."""
        return t

    def leading(self, index: int) -> int:
        """How many of the tokens of a block, the first ones, no tap, no long skip and no head sees; none here."""
        return 0

    def extended(self, index: int, stream: Residual, y: Tree) -> Residual:
        """What a block reads, its leading tokens put before the others where it is the first to have them."""
        return stream

    def compute(self, x: Tree, t: Tensor, y: Tree, taps: Taps, stop: int | None) -> Output | None:
        tokens = self.x_embedder(image(x))
        if not isinstance(x, Tensor):
            token = self.wg_norm(self.cls_projectors2(x["class_token"]))
            tokens = torch.cat((token[:, None], tokens), dim=1)
        # A sum has the strides of its first term: those of the convolution would make every reader of a row copy.
        tokens = self.pos_embed + tokens
        if self.config.residual_dtype == "bf16":
            tokens = tokens.to(linear_dtype(tokens, tokens.dtype))
        wiring = self.config.skip_wiring
        # The first block reads this stream, and the last long skip once more.
        stream = Residual(tokens, statistics_by_kernel(tokens) if wiring == "input" and stop is None else None)
        c = self._condition(t, y)
        modulations = self._modulations(c) if stop is None else {}
        pending: list[Residual] = []
        second: Tree | None = None
        first_half = self.depth // 2 if wiring != "off" else self.depth
        for index, block in enumerate(self.blocks):
            stream, leading = self.extended(index, stream, y), self.leading(index)
            skip = pending.pop() if index >= first_half else None
            if index < first_half and wiring == "input":
                pending.append(stream.after(leading))
            given = (index, block, stream, c, skip, index in taps.attention, modulations.get(block))
            stream = recomputed(self.activation_checkpointing, self._stage, *given)
            if stream.heads is not None:
                taps.heads[index] = Heads(*(part[:, :, leading:] for part in stream.heads))
                stream = stream._replace(heads=None)
            if index in taps:
                own = stream.after(leading)
                stream = Residual(stream.joined(leading, taps(index, own.tokens, own.stats)), stream.stats)
            if index < first_half and wiring == "output":
                pending.append(stream.after(leading))
            if stop is None and index + 1 == self.config.auxiliary_depth:
                second = self._decoded(self.final_layer_xr, stream.after(leading), c, modulations)
            if index == stop:
                return None
        stream = stream.after(self.leading(self.depth - 1))
        if self.config.velocity_head:
            second = self._decoded(self.final_layer_v, stream, c, modulations)
        output = self._decoded(self.final_layer, stream, c, modulations)
        return output if second is None else (output, second)

    def beyond(self, last: int) -> list[nn.Module]:
        if self.config.skip_wiring == "off":
            return super().beyond(last)
        used = max(0, last + 1 - self.depth // 2)
        return [*super().beyond(last), *list(self.skip_linears)[used:], *list(self.skip_norms)[used:]]

    def _condition(self, t: Tensor, y: Tree) -> Tensor:
        if self.times == 1:
            return self.t_embedder(self.network_time(t)) + self.y_embedder(label(y))
        t, r = t.unbind(1)
        c = self.t_embedder(self.network_time(t)) + self.r_embedder(t - r) + self.y_embedder(label(y))
        if not self.guidance_condition:
            return c
        told = guidance_conditions(y, torch.ones_like(t)) if isinstance(y, Tensor) else y
        c = c + self.omega_embedder(1 - 1 / told["omega"])
        return c + self.t_min_embedder(told["t_min"]) + self.t_max_embedder(told["t_max"])

    def side_by_side(self) -> list[nn.Linear]:
        """The layers that make all modulations of the one condition; their shadows lie in one buffer."""
        return [cast(Any, module).adaLN_modulation[-1] for module in self._modulated()]

    def _modulated(self) -> list[nn.Module]:
        heads = [getattr(self, name, None) for name in ("final_layer_xr", "final_layer_v", "final_layer")]
        return [*self.blocks, *(head for head in heads if head is not None)]

    def _modulations(self, c: Tensor) -> Modulations:
        """Those of all blocks and heads by one product, where their layers' shadows lie in one buffer; else none."""
        layers = self.side_by_side()
        if not hasattr(layers[0].weight, "shadow"):
            return {}
        parts = linear_of_all(nn.functional.silu(c), layers, self.hidden_size)
        return {} if parts is None else dict(zip(self._modulated(), parts, strict=True))

    def _stage(
        self,
        index: int,
        block: nn.Module,
        stream: Residual,
        c: Tensor,
        skip: Residual | None,
        heads: bool,
        modulation: Any,
    ) -> Residual:
        """One block with the fusion that belongs to it."""
        if skip is not None and self.config.skip_wiring == "input":
            stream = self._fuse(index, stream, skip)
        given = (stream.tokens, c, stream.stats, self.rotary(index), heads, modulation)
        stream = Residual(*block(*given))
        if skip is not None and self.config.skip_wiring == "output":
            stream = self._fuse(index, stream, skip)._replace(heads=stream.heads)
        return stream

    def _fuse(self, index: int, stream: Residual, skip: Residual) -> Residual:
        pair, leading = index - self.depth // 2, self.leading(index)
        own = stream.after(leading)
        streams = (own.tokens, skip.tokens, self.skip_linears[pair], own.stats, skip.stats)
        out_dtype = None if self.config.residual_dtype == "autocast" else stream.tokens.dtype
        fused = self.skip_norms[pair](*streams, out_dtype)
        return Residual(stream.joined(leading, fused))

    def _decoded(self, head: nn.Module, stream: Residual, c: Tensor, modulations: Modulations) -> Tree:
        """What a head makes of the tokens, as an image."""
        output = head(stream.tokens, c, stream.stats, modulations.get(head))
        if isinstance(output, Tensor):
            return self._unpatchify(output)
        return {**output, "image": self._unpatchify(output["image"])}

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """[N, T, p * p * C], channel fastest, to [N, C, H, W]."""
        patch, (rows, columns) = self.config.patch_size, self.grid
        image = patches.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, columns))
        return image.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def reads(self) -> Reads:
        return [] if self.config.skip_wiring == "off" else list(zip(self.skip_norms, self.skip_linears, strict=True))

    def flops_per_sample(self) -> int:
        patches, tokens = self.num_tokens, self.num_tokens + bool(self.class_token)
        total = self.x_embedder.flops(patches) + self.times * self.t_embedder.flops() + self.final_layer.flops(patches)
        total += sum(cast(Block, block).flops(tokens + self.leading(i)) for i, block in enumerate(self.blocks))
        if self.config.skip_wiring != "off":
            total += sum(cast(SkipLinear, skip).flops(tokens) for skip in self.skip_linears)
        if self.config.auxiliary_depth:
            total += self.final_layer_xr.flops(patches)
        if self.config.velocity_head:
            total += self.final_layer_v.flops(patches)
        if self.guidance_condition:
            total += len(GUIDANCE) * self.omega_embedder.flops()
        return total + (linear_flops(self.cls_projectors2, rows=1) if self.class_token else 0)


_SIZES = ("patch_size", "hidden_size", "depth", "num_heads")


def _check(config: SiT.Config, image: tuple[int, ...]) -> None:
    check_sizes(config, 1, *_SIZES)
    check_sizes(config, 0, "auxiliary_depth")
    if config.auxiliary_depth > config.depth:
        raise ConfigError(f"auxiliary_depth={config.auxiliary_depth} is not one of the blocks 1..{config.depth}")
    if config.velocity_head and config.auxiliary_depth:
        raise ConfigError("velocity_head and auxiliary_depth are both a second output; set one of them")
    for name in ("velocity_head", "guidance_condition"):
        if getattr(config, name) and config.times == 1:
            raise ConfigError(
                f"{name} is for improved mean flow, whose model has two times; set times=2 or {name}=false"
            )
    for name, size in zip(("input_size", "input_width"), image[1:], strict=True):
        if size % config.patch_size:
            raise ConfigError(f"{name} {size} must be a multiple of patch_size {config.patch_size}")
    if config.skip_wiring != "off" and config.depth % 2:
        raise ConfigError(
            f"depth {config.depth} is odd: long skips pair blocks of two halves; use an even depth or skip_wiring=off"
        )
