"""Tiny encoders under the names of their official files, filled from hashes of those names."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

from tests.helpers.deterministic_fill import fill

WIDTH, HIDDEN, DEPTH = 128, 160, 2  # two heads
STORED, GRID, SIDE = 5, 3, 48  # tokens a side of the stored positions and of the features; pixels a side
ENDS = ("weight", "bias")
SPECS = (
    "dinov2-vit-b", "dinov2-vit-b-reg", "dinov2-vit-g", "dino-vit-b", "mae-vit-l", "mocov3-vit-b", "clip-vit-l",
    "ijepa-vit-h",
)  # fmt: skip


def pictures():
    """uint8 [2, 3, SIDE, SIDE]."""
    return ((fill("pictures", (2, 3, SIDE, SIDE), 1.0) + 0.5) * 256).to(torch.uint8)


def patch_of(spec):
    return 14 if spec.startswith(("dinov2", "clip", "ijepa")) else 16


def official(spec):
    """What the official file holds: {name: tensor}, or what it wraps that in; other networks' tensors too."""
    if spec.startswith("clip"):
        return {**_filled(_clip(), "visual."), "logit_scale": torch.ones(())}
    shapes = _transformer(patch_of(spec))
    if spec.startswith("dinov2"):
        shapes |= {"mask_token": (1, WIDTH)}
        shapes |= {f"blocks.{i}.ls{branch}.gamma": (WIDTH,) for i in range(DEPTH) for branch in (1, 2)}
    if spec == "dinov2-vit-b-reg":
        shapes["register_tokens"] = (1, 4, WIDTH)
    if spec == "dinov2-vit-g":
        shapes = {name: shape for name, shape in shapes.items() if ".mlp." not in name}
        for i in range(DEPTH):
            shapes |= _linear(f"blocks.{i}.mlp.w12", 2 * HIDDEN, WIDTH) | _linear(f"blocks.{i}.mlp.w3", WIDTH, HIDDEN)
    if spec.startswith("ijepa"):
        del shapes["cls_token"]
        shapes["pos_embed"] = (1, STORED**2, WIDTH)
        return {"encoder": _filled(shapes, "module."), "epoch": 300}
    if spec.startswith("mae"):
        return {"model": _filled(shapes | {"mask_token": (1, 1, WIDTH)} | _linear("decoder_embed", 8, WIDTH))}
    if spec.startswith("mocov3"):
        own = shapes | _linear("head.0", 16, WIDTH)
        return {"state_dict": _filled(own, "module.base_encoder.") | _filled(own, "module.momentum_encoder.")}
    return _filled(shapes)


@cache
def toy_encoder():
    """The path of a DINOv2 of two blocks and two heads; removed at the end of the process."""
    folder = Path(tempfile.mkdtemp(prefix="encoder-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.save(official("dinov2-vit-b"), folder / "dinov2.pth")
    return folder / "dinov2.pth"


def _transformer(patch):
    shapes = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + STORED**2, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, patch, patch), "patch_embed.proj.bias": (WIDTH,), **_norm("norm"),
    }  # fmt: skip
    for i in range(DEPTH):
        block = f"blocks.{i}"
        shapes |= _norm(f"{block}.norm1") | _norm(f"{block}.norm2")
        shapes |= _linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH) | _linear(f"{block}.attn.proj", WIDTH, WIDTH)
        shapes |= _linear(f"{block}.mlp.fc1", HIDDEN, WIDTH) | _linear(f"{block}.mlp.fc2", WIDTH, HIDDEN)
    return shapes


def _clip():
    shapes = {
        "class_embedding": (WIDTH,), "positional_embedding": (1 + STORED**2, WIDTH), "proj": (WIDTH, 16),
        "conv1.weight": (WIDTH, 3, 14, 14), **_norm("ln_pre"), **_norm("ln_post"),
    }  # fmt: skip
    for i in range(DEPTH):
        block = f"transformer.resblocks.{i}"
        shapes |= _norm(f"{block}.ln_1") | _norm(f"{block}.ln_2")
        shapes |= {f"{block}.attn.in_proj_weight": (3 * WIDTH, WIDTH), f"{block}.attn.in_proj_bias": (3 * WIDTH,)}
        shapes |= _linear(f"{block}.attn.out_proj", WIDTH, WIDTH)
        shapes |= _linear(f"{block}.mlp.c_fc", HIDDEN, WIDTH) | _linear(f"{block}.mlp.c_proj", WIDTH, HIDDEN)
    return shapes


def _norm(name):
    return {f"{name}.{end}": (WIDTH,) for end in ENDS}


def _linear(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _filled(shapes, prefix=""):
    """Scales and gains lie about one."""
    return {
        prefix + name: (fill(prefix + name, shape, 0.4) + (name.endswith("gamma") or _is_gain(name))).float()
        for name, shape in shapes.items()
    }


def _is_gain(name):
    return name.endswith("weight") and name.rpartition(".")[0].rpartition(".")[2].startswith(("norm", "ln_"))
