"""SiT: the transformer of SiT (arXiv 2401.08740), REPA (2410.06940) and, with long skips, DiverseDiT (2603.04239)."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_fast.errors import ConfigError, UserError
from dit_fast.nn.attention import AttentionKind
from dit_fast.nn.block import Block
from dit_fast.nn.embeddings import LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_position_embedding
from dit_fast.nn.final_layer import FinalLayer
from dit_fast.nn.linear import Reads
from dit_fast.nn.long_skip import SkipLinear, SkipNorm
from dit_fast.ops import RowStatistics
from dit_fast.ops.autocast import autocast_dtype

SkipWiring = Literal["off", "input", "output"]
ResidualDtype = Literal["fp32", "autocast"]
Through = Callable[[int, Tensor, RowStatistics | None], Tensor]


class Stream(NamedTuple):
    """Tokens [N, T, D] between two blocks, and their row statistics if the op that wrote them returned any."""

    tokens: Tensor
    stats: RowStatistics | None = None


class SiT(nn.Module):
    """Velocity of a diffusion transformer; time runs from data (0) to noise (1).

    skip_wiring: long residual connections between the two halves. "input" (paper, Eq. 8): before block b of the second
    half, the stream is fused with the input of block L-1-b. "output" (released code): after block b, it is fused with
    the output of block L-1-b. The parameters are the same for both: a checkpoint cannot tell them apart.
    residual_dtype: under autocast, "fp32" returns the fused stream to fp32; "autocast" leaves it in half precision from
    the first fusion on, as the released code does.
    label_dropout: share of labels that become the null label in train mode; with 0 the null label is never trained, so
    `null_label` is -1 and samplers refuse guidance. null_row: whether the label table has a row for it; published
    models that were trained without label dropout have none.
    checkpoint_blocks: recompute each block in the backward pass instead of keeping its activations. attention: see
    `dit_fast.nn.attention.Attention`.
    Parameter names and their order are those of the published code.
    Raises ConfigError for an unknown argument (with the nearest valid name) or a combination that cannot run.
    """

    cfg_channels: Literal["all", "first_three"] = "all"  # those that the released sampler of these weights guides

    def __init__(
        self,
        *,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        num_classes: int = 1000,
        label_dropout: float = 0.1,
        null_row: bool = True,
        skip_wiring: SkipWiring = "off",
        qk_norm: bool = False,
        attention: AttentionKind = "auto",
        residual_dtype: ResidualDtype = "fp32",
        checkpoint_blocks: bool = False,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise ConfigError(_unknown_argument(next(iter(unknown))))
        sizes = {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_classes": num_classes,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        _one_of("skip_wiring", skip_wiring, get_args(SkipWiring))
        _one_of("residual_dtype", residual_dtype, get_args(ResidualDtype))
        if input_size % patch_size:
            raise ConfigError(f"input_size {input_size} must be a multiple of patch_size {patch_size}")
        if not 0 <= label_dropout < 1:
            raise ConfigError(f"label_dropout must lie in [0, 1), not {label_dropout}")
        if label_dropout and not null_row:
            raise ConfigError(f"label_dropout={label_dropout} needs the null label's row; set null_row=True")
        if skip_wiring != "off" and depth % 2:
            raise ConfigError(
                f"depth {depth} is odd: long skips pair blocks of two halves; use an even depth or skip_wiring=off"
            )
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.hidden_size, self.depth, self.num_heads = hidden_size, depth, num_heads
        self.num_classes, self.label_dropout = num_classes, label_dropout
        self.skip_wiring, self.qk_norm, self.attention = skip_wiring, qk_norm, attention
        self.residual_dtype, self.checkpoint_blocks = residual_dtype, checkpoint_blocks
        grid = input_size // patch_size
        self.num_tokens = grid**2
        self.null_label = num_classes if label_dropout else -1

        self.pos_embed = nn.Parameter(sincos_position_embedding(hidden_size, grid), requires_grad=False)
        if skip_wiring != "off":
            self.skip_linears = nn.ModuleList(SkipLinear(hidden_size) for _ in range(depth // 2))
            self.skip_norms = nn.ModuleList(SkipNorm(hidden_size) for _ in range(depth // 2))
        self.x_embedder = PatchEmbed(in_channels, patch_size, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, label_dropout, null_row)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, qk_norm, attention) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        taps: Iterable[int] = (),
        drop: Tensor | None = None,
        through: Through | None = None,
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """Velocity at x [N, C, H, W], times t [N] in [0, 1], labels y [N] int64 (num_classes = null label).

        taps: indices (from 0) of blocks whose output [N, T, D] is handed out, as the published code records it: after
        the fusion in "output" wiring. drop: bool [N], rows whose label becomes the null label; None draws them with
        probability label_dropout from torch's generator in train mode and drops none in eval mode. through(index,
        feature, row statistics or None): identities that the outputs named in taps pass on their way to the next block
        and into the features (methods that fold their gradient into the block's backward).
        Returns v [N, C, H, W], or (v, {index: feature}) when taps are asked for. Raises UserError for bad input.
        """
        wanted = sorted(set(taps))
        self._check(x, t, y, wanted, drop)
        # A sum has the strides of its first term: those of the convolution would make every reader of a row copy.
        tokens = self.pos_embed + self.x_embedder(x)
        c = self.t_embedder(t) + self.y_embedder(y, drop)
        stream = Stream(tokens)
        features: dict[int, Tensor] = {}
        pending: list[Stream] = []
        first_half = self.depth // 2 if self.skip_wiring != "off" else self.depth
        for index in range(self.depth):
            skip = pending.pop() if index >= first_half else None
            if index < first_half and self.skip_wiring == "input":
                pending.append(stream)
            if self.checkpoint_blocks and torch.is_grad_enabled():
                stream = checkpoint(self._stage, index, stream, c, skip, use_reentrant=False, preserve_rng_state=False)
            else:
                stream = self._stage(index, stream, c, skip)
            if through is not None and index in wanted:
                stream = Stream(through(index, stream.tokens, stream.stats), stream.stats)
            if index < first_half and self.skip_wiring == "output":
                pending.append(stream)
            if index in wanted:
                features[index] = stream.tokens
        output = self._unpatchify(self.final_layer(stream.tokens, c, stream.stats))
        return (output, features) if wanted else output

    def _stage(self, index: int, stream: Stream, c: Tensor, skip: Stream | None) -> Stream:
        """One block with the fusion that belongs to it."""
        if skip is not None and self.skip_wiring == "input":
            stream = self._fuse(index, stream, skip)
        stream = Stream(*self.blocks[index](stream.tokens, c, stream.stats))
        if skip is not None and self.skip_wiring == "output":
            stream = self._fuse(index, stream, skip)
        return stream

    def _fuse(self, index: int, stream: Stream, skip: Stream) -> Stream:
        pair = index - self.depth // 2
        streams = (stream.tokens, skip.tokens, self.skip_linears[pair], stream.stats, skip.stats)
        fused = self.skip_norms[pair](*streams)
        return Stream(fused.to(stream.tokens.dtype) if self.residual_dtype == "fp32" else fused)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """[N, T, p * p * C], channel fastest, to [N, C, H, W]."""
        size, patch = self.input_size, self.patch_size
        grid, channels = size // patch, patches.shape[-1] // patch**2
        image = patches.reshape(-1, grid, grid, patch, patch, channels)
        return image.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, size, size)

    def _check(self, x: Tensor, t: Tensor, y: Tensor, wanted: list[int], drop: Tensor | None) -> None:
        expected = (self.in_channels, self.input_size, self.input_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise UserError(f"x must be [N, {', '.join(map(str, expected))}] for this model, not {tuple(x.shape)}")
        for name, vector in {"t": t, "y": y, **({} if drop is None else {"drop": drop})}.items():
            if tuple(vector.shape) != (x.shape[0],):
                raise UserError(f"{name} must be [N] = ({x.shape[0]},), not {tuple(vector.shape)}")
        if drop is not None and drop.dtype != torch.bool:
            raise UserError(f"drop must be bool, not {drop.dtype}")
        if y.is_floating_point():
            raise UserError(f"y must hold integer labels, not {y.dtype}")
        weight = self.x_embedder.proj.weight
        if x.dtype != weight.dtype and autocast_dtype(x) is None:
            raise UserError(
                f"x is {x.dtype} but the model's weights are {weight.dtype}; convert one of them or use autocast"
            )
        for index in wanted:
            if not 0 <= index < self.depth:
                raise UserError(f"tap {index} is not a block of this model (0 .. {self.depth - 1})")

    def add_extra(self, name: str, module: nn.Module) -> None:
        """Registers a module of a training method where the published code has it: after the blocks, before the head.

        Raises ConfigError if the name is taken.
        """
        if hasattr(self, name):
            raise ConfigError(f"the model already has '{name}'; two methods cannot add a module of one name")
        head = self.final_layer
        del self.final_layer
        self.add_module(name, module)
        self.final_layer = head

    def reads(self) -> Reads:
        return [] if self.skip_wiring == "off" else list(zip(self.skip_norms, self.skip_linears, strict=True))

    def flops_per_sample(self) -> int:
        """Forward FLOPs of one sample, multiply-add = 2; without modules added by methods."""
        tokens = self.num_tokens
        total = self.x_embedder.flops(tokens) + self.t_embedder.flops() + self.final_layer.flops(tokens)
        total += sum(cast(Block, block).flops(tokens) for block in self.blocks)
        if self.skip_wiring != "off":
            total += sum(cast(SkipLinear, skip).flops(tokens) for skip in self.skip_linears)
        return total


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, not '{value}'")


def _unknown_argument(name: str) -> str:
    known = [key for key in inspect.signature(SiT).parameters if key != "unknown"]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"unknown model argument '{name}'; " + (
        f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(known)}"
    )
