"""Records what timm's vision transformers give for the tiny encoders of `encoder_weights`: tests/data/encoders.npz.

Install in a folder of its own: torchvision's wheel is built for CUDA, and breaks what imports it beside torch for CPUs.

    pip install --no-deps --target reference timm==1.0.31 torchvision==0.28.0
    PYTHONPATH=reference:. python -m tests.helpers.record_encoders
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch

LIBRARY = torch.library.Library("torchvision", "DEF")  # operators that its Python part expects of its compiled part
for OPERATOR in ("nms", "qnms"):
    LIBRARY.define(f"{OPERATOR}(Tensor d, Tensor s, float t) -> Tensor")

from timm.layers import GluMlp, get_act_layer, resample_abs_pos_embed  # noqa: E402
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn  # noqa: E402
from torchvision.transforms import Normalize  # noqa: E402

from tests.helpers.encoder_weights import DEPTH, GRID, HIDDEN, SPECS, WIDTH, official, patch_of, pictures  # noqa: E402

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def library(spec):
    """timm's network with the weights of the official file, as timm converts them."""
    kind, giant, registers = spec.split("-")[0], spec.endswith("-g"), 4 * spec.endswith("-reg")
    network = VisionTransformer(
        img_size=GRID * patch_of(spec), patch_size=patch_of(spec), embed_dim=WIDTH, depth=DEPTH, num_heads=2,
        mlp_ratio=HIDDEN / WIDTH * (2 if giant else 1), num_classes=0, class_token=kind != "ijepa",
        global_pool="token" if kind != "ijepa" else "avg", fc_norm=False if kind == "ijepa" else None,
        reg_tokens=registers, no_embed_class=bool(registers), init_values=1.0 if kind == "dinov2" else None,
        pre_norm=kind == "clip", norm_layer=partial(torch.nn.LayerNorm, eps=1e-5 if kind == "clip" else 1e-6),
        **{"act_layer": get_act_layer("quick_gelu")} if kind == "clip" else {},
        **{"mlp_layer": partial(GluMlp, gate_last=False), "act_layer": torch.nn.SiLU} if giant else {},
    ).eval()  # fmt: skip
    state = official(spec)
    if kind == "mocov3":  # as REPA reads it
        mark = "module.base_encoder."
        state = {name.removeprefix(mark): x for name, x in state["state_dict"].items() if name.startswith(mark)}
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [GRID, GRID])
    state = checkpoint_filter_fn(state, network)
    told = network.load_state_dict(state, strict=False)
    assert not told.missing_keys, told
    assert all(name.startswith(("head", "decoder", "mask_token")) for name in told.unexpected_keys), told
    return network


@torch.no_grad()
def outputs(spec):
    """features, class_token, and queries and keys of the last block."""
    kind, network, size = spec.split("-")[0], library(spec), GRID * patch_of(spec)
    x = pictures() / 255.0
    resize = partial(torch.nn.functional.interpolate, size=size, mode="bicubic")
    x = Normalize(*OPENAI)(resize(x)) if kind == "clip" else Normalize(*IMAGENET)(x)
    x = resize(x) if kind in ("dinov2", "ijepa") else x
    seen = {}
    network.blocks[-1].register_forward_hook(lambda module, given, output: seen.update(raw=output))
    network.blocks[-1].attn.qkv.register_forward_hook(lambda module, given, output: seen.update(qkv=output))
    tokens = network.forward_features(x)
    tokens = seen["raw"] if kind in ("mae", "clip") else tokens  # as REPA takes them
    prefix = network.num_prefix_tokens
    given = {"features": tokens[:, prefix:], **({"class_token": tokens[:, 0]} if prefix else {})}
    if spec in ("dinov2-vit-b-reg", "clip-vit-l"):
        query, key, _ = seen["qkv"].unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        given |= {"query": query, "key": key}
    return given


if __name__ == "__main__":
    arrays = {f"{spec}/{name}": value.numpy() for spec in SPECS for name, value in outputs(spec).items()}
    np.savez_compressed(Path(__file__).parents[1] / "data" / "encoders.npz", **arrays)
