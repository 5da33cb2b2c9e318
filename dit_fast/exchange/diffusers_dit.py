"""DiT under the names of diffusers' DiTTransformer2DModel."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dit_fast.checkpoint import export_official
from dit_fast.checkpoint.run import LoadedRun
from dit_fast.models.dit import DiT

NULL_LABEL = 1000  # DiTPipeline guides away from this one

TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
OF_ALL = {  # diffusers keeps a copy in every block
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
OF_ONE = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def reasons_against(run: LoadedRun, vae: Any) -> list[str]:
    """Why a run is not what DiTPipeline can draw; [] if it is. vae: diffusers' module, None where there is none."""
    model, config = run.model, run.config.model
    if type(model) is not DiT:
        return [f"the model is a {type(model).__name__}"]
    plain = {"skip_wiring": "off", "qk_norm": False, "class_token": 0, "times": 1}
    found = [f"model.{key} is {getattr(config, key)}" for key, value in plain.items() if getattr(config, key) != value]
    if model.null_label != NULL_LABEL:
        found.append(f"the null label is {model.null_label}, and DiTPipeline's is {NULL_LABEL}")
    if len(set(model.shapes["image"][1:])) > 1:
        found.append("latents are not square")
    if vae is None:
        found.append("the autoencoder is none of diffusers")
    elif getattr(vae.config, "shift_factor", None) or getattr(vae.config, "latents_mean", None):
        found.append("its latents are shifted")
    return found


def settings(model: DiT) -> dict[str, Any]:
    """The configuration of DiTTransformer2DModel."""
    channels, size, _ = model.shapes["image"]
    config: Any = model.config
    return {
        "num_attention_heads": model.num_heads,
        "attention_head_dim": model.hidden_size // model.num_heads,
        "in_channels": channels,
        "out_channels": 2 * channels,
        "num_layers": model.depth,
        "sample_size": size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": model.num_classes,
        "norm_eps": 1e-6,
    }


def state(model: DiT) -> dict[str, Tensor]:
    """Weights under diffusers' names."""
    return renamed(export_official(model, "dit"), model.depth)


def renamed(official: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """From DiT's published names. The position embedding is left out: diffusers makes the same one again."""
    found: dict[str, Tensor] = {}
    for name, tensor in official.items():
        module, _, leaf = name.rpartition(".")
        if module in TOP:
            found[f"{TOP[module]}.{leaf}"] = tensor
        elif module in OF_ALL:
            found |= {f"transformer_blocks.{block}.{OF_ALL[module]}.{leaf}": tensor.clone() for block in range(depth)}
        elif module.startswith("blocks."):
            _, block, within = module.split(".", 2)
            if within == "attn.qkv":
                parts = zip(QKV, tensor.chunk(3), strict=True)
                found |= {f"transformer_blocks.{block}.{part}.{leaf}": own.clone() for part, own in parts}
            else:
                found[f"transformer_blocks.{block}.{OF_ONE[within]}.{leaf}"] = tensor
    return found
