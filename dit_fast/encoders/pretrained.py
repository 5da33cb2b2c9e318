"""DINO, DINOv2, MAE, MoCo-v3, CLIP and I-JEPA from local files, with the preprocessing that REPA's trainer gives them.

A spec is KIND-vit-SIZE:PATH, e.g. `dinov2-vit-b:/weights/dinov2_vitb14_pretrain.pth` or `dinov2-vit-b-reg:PATH`. PATH
is the official file, timm's (`model.safetensors`, or torch.save's), or a folder with one of them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_fast.data.files import weights_identity
from dit_fast.encoders.vit import QueryKey, Sizes, ViT, side
from dit_fast.errors import ConfigError, DataError, UserError
from dit_fast.published import read_state

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WIDTHS = {"s": 384, "b": 768, "l": 1024, "h": 1280, "g": 1536}
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a family of encoders has in common. sizes: letters of the released ones. norm: whether REPA's features are
    taken after the last LayerNorm. normalise_last: after resizing, not before. files: names of the official weights,
    with the size for {}.
    """

    sizes: str
    files: tuple[str, ...]
    norm: bool = True
    pre_norm: bool = False
    quick_gelu: bool = False
    eps: float = 1e-6
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    normalise_last: bool = False


KINDS = {
    "dinov2": Kind(sizes="sblg", files=("dinov2_vit{}14{reg}_pretrain.pth",)),
    "dino": Kind(
        sizes="sb", files=("dino_vit{long}16_pretrain.pth", "dino_deit{long}16_pretrain.pth", "dinov1_vit{}.pth")
    ),
    "mae": Kind(sizes="blh", files=("mae_pretrain_vit_{long}.pth", "mae_vit{}.pth"), norm=False),
    "mocov3": Kind(sizes="sbl", files=("mocov3_vit{}.pth", "vit-{}-300ep.pth.tar")),
    "clip": Kind(
        sizes="bl",
        files=("ViT-{upper}-14.pt", "ViT-{upper}-16.pt"),
        norm=False,
        pre_norm=True,
        quick_gelu=True,
        eps=1e-5,
        statistics=OPENAI,
        normalise_last=True,
    ),
    "ijepa": Kind(sizes="h", files=("ijepa_vit{}.pth", "IN1K-vit.h.14-300e.pth.tar")),
}
LONG = {"s": "small", "b": "base", "l": "large", "h": "huge", "g": "giant"}
FORMS = (
    ", ".join(f"{kind}-vit-{'|'.join(each.sizes)}:PATH" for kind, each in KINDS.items()) + ", dinov2-vit-...-reg:PATH"
)
SPEC = re.compile(r"(?P<kind>[a-z0-9]+)-vit-(?P<size>[a-z])(?P<reg>-reg)?")

# Names of other codes for what is called after timm here; they are replaced in this order.
CLIP_NAMES = {
    "conv1": "patch_embed.proj", "positional_embedding": "pos_embed", "class_embedding": "cls_token",
    "transformer.resblocks.": "blocks.", "ln_pre": "norm_pre", "ln_post": "norm", "ln_": "norm",
    "in_proj_": "qkv.", "out_proj": "proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
OTHER_NAMES = {
    "reg_token": "register_tokens", "mlp.w12.": "mlp.fc1.", "mlp.w3.": "mlp.fc2.", "fc_norm.": "norm.",
    # the published MoCo-v3 files have these
    ".norm13.": ".norm1.", ".norm14.": ".norm2.", ".fc13.": ".fc1.", ".fc14.": ".fc2.",
}  # fmt: skip
UNUSED = re.compile(r"mask_token|head\..*|fc\..*|decoder_.*|proj|head_drop.*")  # heads and decoders of the training


class PretrainedViT:
    """A frozen vision transformer. Features are its patch tokens, as REPA takes them, and its class token.

    Features of MAE and CLIP are taken before the last LayerNorm, of the others after it. Images are normalised (mean
    and deviation of ImageNet, or OpenAI's for CLIP) and, where their side is not grid * patch, resized to that
    (bicubic, not antialiased; CLIP: before they are normalised). I-JEPA has no class token.

    path: a file or folder. Raises ConfigError where the file holds another network, DataError (CheckpointError) where
    there is none or it cannot be read.
    """

    def __init__(self, kind: str, size: str, registers: bool, path: str):
        self._kind = KINDS[kind]
        name = f"{kind}-vit-{size}{'-reg' * registers}"
        file = _file(Path(path), self._kind, size, registers)
        state = _renamed(read_state(file, "model").tensors, self._kind.norm)
        sizes = _sizes(state, self._kind, kind, name, file)
        if bool(sizes.registers) != registers:
            other = f"{kind}-vit-{size}{'-reg' * (not registers)}"
            raise ConfigError(f"{name}:{file}: holds {sizes.registers or 'no'} registers; the spec is {other}:PATH")
        check_size(f"{name}:{file}", kind, size, sizes.width)
        with torch.device("meta"):  # draws nothing from torch's generator
            self.network = ViT(sizes)
        _load(self.network, state, file)
        self.network.eval().requires_grad_(False)
        self.name, self.width, self.depth, self.heads = name, sizes.width, sizes.depth, sizes.heads
        self.identity = weights_identity(name, [file])
        mean, deviation = (torch.tensor(each, dtype=torch.float32).view(3, 1, 1) for each in self._kind.statistics)
        self._mean, self._deviation = mean, deviation

    @property
    def prefix(self) -> int:
        """Tokens ahead of the patches: the class token and registers."""
        return self.network.prefix

    def to(self, device: torch.device | str) -> Self:
        self.network.to(device)
        self._mean, self._deviation = self._mean.to(device), self._deviation.to(device)
        return self

    def shapes(self, grid: int) -> dict[str, tuple[int, ...]]:
        token = {"class_token": (self.width,)} if self.network.sizes.class_token else {}
        return {"features": (grid * grid, self.width), **token}

    def __call__(self, images: Tensor, grid: int) -> dict[str, Tensor]:
        return self.encode(images, grid)[0]

    def attention(self, images: Tensor, grid: int, layers: Sequence[int]) -> list[QueryKey]:
        """Queries and keys [N, H, T, d] of these blocks (from 0), unscaled, in their order.

        T counts all tokens: the first `prefix` are the class token and registers, the others the patches row by row.
        What comes after the last of them is not computed. Raises UserError for a block that is not there.
        """
        self._check(layers)
        with torch.no_grad():
            _, seen = self.network(self._pixels(images, grid), layers, max(layers, default=0))
        return [seen[layer] for layer in layers]

    @torch.no_grad()
    def encode(self, images: Tensor, grid: int, layers: Sequence[int] = ()) -> tuple[dict[str, Tensor], list[QueryKey]]:
        """What a call and `attention` give, of one pass."""
        self._check(layers)
        tokens, seen = self.network(self._pixels(images, grid), layers)
        given = {"features": tokens[:, self.prefix :].float().contiguous()}
        if self.network.sizes.class_token:
            given["class_token"] = tokens[:, 0].float().contiguous()
        return given, [seen[layer] for layer in layers]

    def _check(self, layers: Sequence[int]) -> None:
        for layer in layers:
            if not 0 <= layer < self.depth:
                raise UserError(f"{self.name} has blocks 0..{self.depth - 1}, no {layer}")

    def _pixels(self, images: Tensor, grid: int) -> Tensor:
        x, size = (images + 1) / 2, grid * self.network.sizes.patch
        resize = x.shape[-2:] != (size, size)
        if resize and self._kind.normalise_last:
            x = F.interpolate(x, (size, size), mode="bicubic")
        x = (x - self._mean) / self._deviation
        return F.interpolate(x, (size, size), mode="bicubic") if resize and not self._kind.normalise_last else x


def load_pretrained(spec: str) -> PretrainedViT | None:
    """The encoder of a spec, None where it has another form. Raises ConfigError for a size that is not there."""
    name, _, path = spec.partition(":")
    match = SPEC.fullmatch(name)
    if match is None or match["kind"] not in KINDS:
        return None
    kind, size, registers = match["kind"], match["size"], bool(match["reg"])
    if size not in KINDS[kind].sizes or (registers and kind != "dinov2"):
        raise ConfigError(f"unknown encoder '{name}'; valid forms: {FORMS}")
    if not path:
        raise ConfigError(f"encoder '{name}' needs its weights; give {name}:PATH, a file or its folder")
    return PretrainedViT(kind, size, registers, path)


def check_size(spec: str, kind: str, size: str, width: int) -> None:
    """Raises ConfigError for the width of a released size other than this letter's. Widths of none are taken."""
    letter = next((key for key, each in WIDTHS.items() if each == width), size)
    if letter != size:
        raise ConfigError(f"{spec}: is {width} wide, as size '{letter}' is; write {kind}-vit-{letter}")


def head_count(kind: str, width: int) -> int:
    """Of the released network of this width, where heads are 64 wide but for two; of any other, heads of 64."""
    return 12 if (kind, width) == ("mocov3", 384) else 16 if width == 1280 else width // 64


def _file(path: Path, kind: Kind, size: str, registers: bool) -> Path:
    """The weights that a path means. Raises DataError for none, or several of which none has an official name."""
    if not path.is_dir():
        return path
    found = sorted(item for item in path.iterdir() if item.suffix in SUFFIXES and item.is_file())
    words = {"long": LONG[size], "upper": size.upper(), "reg": "_reg4" * registers}
    official = [file.format(size, **words) for file in (*kind.files, "model.safetensors")]
    for name in official:
        if path / name in found:
            return path / name
    if len(found) == 1:
        return found[0]
    what = f"holds {len(found)} files of weights" if found else "holds no weights"
    raise DataError(f"{path}: {what}, none of them named {' or '.join(official)}; give the file itself")


def _renamed(state: Mapping[str, Tensor], norm: bool) -> dict[str, Tensor]:
    """The encoder's own tensors under timm's names."""
    for owner in ("base_encoder.", "visual."):  # of MoCo-v3, which holds a second network; of CLIP
        if any(name.startswith(owner) for name in state):
            state = {name.removeprefix(owner): value for name, value in state.items() if name.startswith(owner)}
    names = CLIP_NAMES if "class_embedding" in state else OTHER_NAMES
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if UNUSED.fullmatch(name) or (name.startswith("norm.") and not norm):
            continue
        if name in ("pos_embed", "cls_token"):
            value = value.reshape(1, -1, value.shape[-1])
        result[name] = value.detach().float()
    return result


def _sizes(state: dict[str, Tensor], kind: Kind, family: str, name: str, file: Path) -> Sizes:
    """Sizes read off the shapes; the class token's position is added to it, so that `pos_embed` is the patches'."""
    kernel, positions, inner = (
        state.get(key) for key in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc2.weight")
    )
    blocks = {int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.", key))}
    if kernel is None or positions is None or inner is None or kernel.dim() != 4 or not blocks:
        raise ConfigError(f"{name}:{file}: is no vision transformer under names of {family} or timm; give its weights")
    for part, expected in (("cls_token", family != "ijepa"), ("blocks.0.ls1.gamma", family == "dinov2")):
        if (part in state) != expected:
            told = f"lacks '{part}', which {family} has" if expected else f"has '{part}', which {family} lacks"
            raise ConfigError(f"{name}:{file}: {told}; name the encoder that it is of")
    width, count = kernel.shape[0], positions.shape[1]
    if "cls_token" in state and side(count) is None:
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions = positions[:, 1:]
        count -= 1
    grid = side(count)
    heads = head_count(family, width)
    if grid is None or width % max(heads, 1) or not heads:
        raise ConfigError(f"{name}:{file}: {count} positions of width {width} are no square, or no heads of width 64")
    registers = state.get("register_tokens")
    first = state.get("blocks.0.mlp.fc1.weight")
    return Sizes(
        width=width,
        depth=max(blocks) + 1,
        heads=heads,
        patch=kernel.shape[-1],
        grid=grid,
        hidden=inner.shape[-1],
        class_token="cls_token" in state,
        registers=0 if registers is None else registers.shape[1],
        norm=kind.norm,
        pre_norm=kind.pre_norm,
        layer_scale="blocks.0.ls1.gamma" in state,
        swiglu=first is not None and first.shape[0] == 2 * inner.shape[-1],
        quick_gelu=kind.quick_gelu,
        eps=kind.eps,
    )


def _load(network: ViT, state: Mapping[str, Tensor], file: Path) -> None:
    expected: Mapping[str, Any] = network.state_dict()
    for name in [*expected, *state]:
        ours, theirs = expected.get(name), state.get(name)
        if ours is None or theirs is None:
            raise ConfigError(
                f"{file}: {'lacks' if theirs is None else 'has a further'} '{name}'; give the encoder's weights"
            )
        if ours.shape != theirs.shape or not theirs.isfinite().all():
            raise ConfigError(
                f"{file}: '{name}' is {list(theirs.shape)} where the other shapes make {list(ours.shape)}, or not "
                "finite; fetch the file again"
            )
    network.load_state_dict(dict(state), assign=True)
