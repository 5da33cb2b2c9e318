"""Recipes: functions that return a whole `TrainConfig`, and how a command line changes one.

Paper presets are named METHOD-SIZE-RESOLUTION (`diversedit-xl2-256`, `sit-b2-512`, `repa-l2-256`,
`diversedit-repa-b2-256`). They carry the settings of DiverseDiT (arXiv 2603.04239, Sec. 4.1 and Tab. A1): AdamW 1e-4
constant, batch 256, clip 1.0, EMA 0.9999, label dropout 0.1, 400K steps, linear path, uniform t; bf16 in place of fp16.
REPA is aligned at block 5 (B) or 8 (L, XL), REG at 4 or 8, coefficient 0.5, iREPA (arXiv 2512.10794) at 4 or 8,
coefficient 1. SRA has the blocks, the distance and the weight of its paper (arXiv 2505.02831), Dispersive Loss (arXiv
2506.09027) the setting of its JAX code: a quarter of the blocks, weight and tau 0.5, 16 samples at a time. DiverseDiT
tells no coefficients of its runs with SRA and Dispersive Loss (Tab. 9): here they have each method's own. Mean flow
(`mean_flow-b4-256`, `diversedit-mean_flow-xl2-256`) has its own settings (arXiv 2505.13447): beta2 0.95, no clipping,
float32. So has improved mean flow (`improved_mean_flow-xl2-256`; arXiv 2512.02012), in batches of 1024 with a warm-up,
on SiT's transformer; its code gives what it trained B with, which L and XL have here too. So has DiT (`dit-xl2-256`,
`diversedit-dit-xl2-256`; arXiv 2212.09748): no clipping, float32; with SRA (`sra-dit-xl2-256`) other blocks and a lower
weight than SiT. LightningDiT (`lightningdit-xl1-256`, `diversedit-lightningdit-b1-256`; arXiv 2501.01423) has those of
its released XL: batch 1024, 2e-4, beta2 0.95, no clipping, 80K steps, lognormal t, and a cosine beside the squared
error.
HASTE (arXiv 2505.16792) has the blocks that are written into its code, whatever the size; it needs a DINOv2
(`methods.haste.encoders=dinov2-vit-b:PATH`) and shards with images.
REPA-E (arXiv 2504.10483) is aligned as REPA is; it needs an SD-VAE and the weights of LPIPS, by path.
Internal guidance (arXiv 2512.24176) has its second head on block 8, LayerSync (arXiv 2510.12581) aligns block 8 with
16, contrastive flow matching (arXiv 2506.05350) has a weight of 0.05, SRA 2 (arXiv 2601.17830) its head on block 2 (B)
or 8.
`self_transcendence-b2-256` (two stages; also with DiverseDiT) has queries and keys normalised, as published.
`rae-xl1-256` (and with DiverseDiT) trains LightningDiT-XL/1 on tokens of DINOv2-B as RAE does (arXiv 2510.11690), but
for its learning rate, which is constant.
JiT (`jit-b16-256`, `diversedit-jit-h16-256`; arXiv 2511.13720) is trained on pixels: batch 1024, 2e-4, beta2 0.95, no
clipping, 5 epochs of warm-up, 600 in all. DDT (`ddt-xl2-256`, `repa-ddt-xl2-256`; arXiv 2504.05741) has beta2 0.95, no
clipping and lognormal t; beside REPA a projector as wide as the model.
`quickstart` and `quickstart-METHOD` learn ten classes in minutes on two CPU cores.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dit_fast.errors import ConfigError
from dit_fast.methods import METHODS
from dit_fast.methods.contrastive_flow import ContrastiveFlow
from dit_fast.methods.dispersive import Dispersive
from dit_fast.methods.diversedit import DiverseDiT
from dit_fast.methods.haste import HASTE
from dit_fast.methods.internal_guidance import InternalGuidance
from dit_fast.methods.layersync import LayerSync
from dit_fast.methods.reg import REG
from dit_fast.methods.repa import REPA
from dit_fast.methods.repa_e import REPAE
from dit_fast.methods.self_transcendence import SelfTranscendence
from dit_fast.methods.sra import SRA
from dit_fast.methods.sra2 import SRA2
from dit_fast.models import DDT, DiT, JiT, LightningDiT, SiT
from dit_fast.objectives import DDPM, Flow, ImprovedMeanFlow, MeanFlow
from dit_fast.options import nearest, reference
from dit_fast.runs import (
    DataConfig,
    EngineConfig,
    OptimizerConfig,
    PreviewConfig,
    RunConfig,
    TrainConfig,
    changed,
    read_config,
)

NANO = SiT.Config(name="SiT-Nano/2")  # six blocks of quick-start size
ENCODER_DEPTH = {"b2": 5, "l2": 8, "xl2": 8}  # aligned block, counted from 1
EARLY_DEPTH = {"b2": 4, "l2": 8, "xl2": 8}  # the same of REG and iREPA
IREPA: dict[str, Any] = {"projector": "conv", "spatial_norm": 0.6, "weight": 1.0}  # of its trainer on latents
SELF_ALIGNED = {"b2": (3, 8), "l2": (6, 16), "xl2": (8, 20)}  # blocks of SRA's student and teacher, from 1
SELF_WEIGHT = {256: (149, 1000), 512: (99, 800)}  # epochs of SRA's weight: until it falls, then to a tenth
LARGE_EPOCH = 1251  # steps of 1024 samples in ImageNet's 1,281,167
EPOCH = 5004  # steps of 256 samples in ImageNet's 1,281,167
GUIDED_TARGETS = {  # omega, kappa, largest guided t of mean flow: B and L as published, XL as other trainers have it
    "b4": (1.0, 0.5, 1.0),
    "b2": (1.0, 0.5, 1.0),
    "l2": (0.2, 0.92, 0.8),
    "xl2": (0.2, 0.92, 0.75),
}
X_PREDICTION = Flow.Config(  # JiT's weighting and times, in our direction
    prediction="x", weighting="velocity", time="logit_normal", time_mean=0.8, time_std=0.8
)
JIT_GUIDANCE = {"b16": 2.9, "l16": 2.4, "h16": 2.2}
TOLD_GUIDANCE = {  # omega, t_min, t_max of improved mean flow: of previews (B), of samples of released weights (L, XL)
    "b2": (7.5, 0.4, 0.65),
    "l2": (10.5, 0.4, 0.6),
    "xl2": (8.0, 0.42, 0.62),
}


def paper(name: str, size: str, resolution: int) -> TrainConfig:
    """The published setting of one or more parts, as `PUBLISHED` names them, at 256 or 512 pixels.

    Latents are f8 of 4 channels, for LightningDiT f16 of 32, for RAE 16 x 16 tokens of DINOv2-B, for JiT the pixels.
    """
    parts = name.split("-")
    of_model: dict[str, Any] = {"class_token": 768} if "reg" in parts else {}  # DINOv2-B's
    if "internal_guidance" in parts:
        of_model = {"auxiliary_depth": 8}
    of_run: dict[str, Any] = {}
    if "dispersive" in parts:
        of_run = {"engine": EngineConfig(micro_batch=16)}
    if "self_transcendence" in parts:
        of_model = {"qk_norm": True}
    if "dit" in parts:
        of_run = {
            "objective": DDPM.Config(),
            "optimizer": OptimizerConfig(grad_clip=0.0),
            "engine": EngineConfig(precision="fp32"),
            "preview": PreviewConfig(sampler="ddim"),
        }
    if "mean_flow" in parts:
        omega, kappa, high = GUIDED_TARGETS[size]
        of_model = {"times": 2}
        of_run = {
            "objective": MeanFlow.Config(omega=omega, kappa=kappa, guidance_high=high),
            "optimizer": OptimizerConfig(beta2=0.95, grad_clip=0.0),
            "engine": EngineConfig(precision="fp32"),
            "preview": PreviewConfig(sampler="mean_flow", num_steps=1, cfg_scale=1.0),
        }
    kind: Any = DiT if "dit" in parts else SiT
    of_latents, steps = (8, 4), RunConfig.steps
    if "improved_mean_flow" in parts:
        omega, low, high = TOLD_GUIDANCE[size]
        of_model = {"times": 2, "velocity_head": True, "guidance_condition": True}
        steps = 640 * LARGE_EPOCH
        of_run = {
            "objective": ImprovedMeanFlow.Config(),
            "optimizer": OptimizerConfig(beta2=0.95, grad_clip=0.0, warmup_steps=10 * LARGE_EPOCH),
            "engine": EngineConfig(precision="fp32", global_batch=1024),
            "preview": PreviewConfig(
                sampler="mean_flow", num_steps=1, cfg_scale=1.0, omega=omega, t_min=low, t_max=high
            ),
        }
    if "lightningdit" in parts:
        kind, of_latents, steps = LightningDiT, (16, 32), 80_000
        of_run = {
            "objective": Flow.Config(time="lognormal", cosine_weight=1.0),
            "optimizer": OptimizerConfig(lr=2e-4, beta2=0.95, grad_clip=0.0),
            "engine": EngineConfig(global_batch=1024),
        }
    if "rae" in parts:
        kind, of_latents, steps = LightningDiT, (16, 768), 80 * LARGE_EPOCH
        of_run = {
            "objective": Flow.Config(time_shift=0.0),
            "optimizer": OptimizerConfig(lr=2e-4, grad_clip=0.0, ema_decay=0.9995),
            "engine": EngineConfig(global_batch=1024),
            "preview": PreviewConfig(cfg_scale=1.0),
        }
    if "jit" in parts:
        kind, of_latents, steps = JiT, (1, 3), 600 * LARGE_EPOCH
        of_run = {
            "objective": X_PREDICTION,
            "optimizer": OptimizerConfig(lr=2e-4, beta2=0.95, grad_clip=0.0, warmup_steps=5 * LARGE_EPOCH),
            "engine": EngineConfig(global_batch=1024),
            "preview": PreviewConfig(sampler="heun", cfg_scale=JIT_GUIDANCE[size]),
        }
    if "ddt" in parts:
        kind = DDT
        of_run = {
            "objective": Flow.Config(time="lognormal"),
            "optimizer": OptimizerConfig(beta2=0.95, grad_clip=0.0),
        }
    if "diversedit" in parts and has_long_skips(kind.Config):
        of_model["skip_wiring"] = "input"
    width = size.rstrip("0123456789")
    return TrainConfig(
        model=kind.Config(
            name=f"{kind.__name__}-{width.upper()}/{size.removeprefix(width)}",
            input_size=resolution // of_latents[0],
            in_channels=of_latents[1],
            num_classes=1000,
            **of_model,
        ),
        methods=tuple(_method(part, parts, size, resolution) for part in parts if part in {*METHODS, "irepa"}),
        run=RunConfig(dir=f"runs/{name}-{size}-{resolution}", steps=steps),
        **of_run,
    )


def _method(name: str, parts: Sequence[str], size: str, resolution: int) -> Any:
    """The published setting of one method among the parts of a recipe."""
    if name == "diversedit":
        aligned = next((part for part in parts if part in ("repa", "irepa", "repa_e")), None)
        return DiverseDiT.Config(encoder_depth=_aligned(aligned, size).encoder_depth if aligned else None)
    if name == "repa" and "ddt" in parts:
        return REPA.Config(projector_width=1152)
    if name in ("repa", "irepa", "repa_e"):
        return _aligned(name, size)
    if name == "reg":
        return REG.Config(encoder_depth=EARLY_DEPTH[size])
    if name == "sra":
        knee, decade = SELF_WEIGHT[resolution]
        student, teacher, weight = (8, 16, 0.04) if "dit" in parts else (*SELF_ALIGNED[size], 0.2)
        return SRA.Config(
            student_depth=student,
            teacher_depth=teacher,
            distance="smooth_l1",
            weight=weight,
            weight_knee=knee * EPOCH,
            weight_decade=decade * EPOCH,
        )
    if name == "sra2":
        return SRA2.Config(depth=2 if size == "b2" else 8)
    return METHODS[name].Config()


def has_long_skips(config: object) -> bool:
    """Whether a backbone's Config has them as a setting."""
    return hasattr(config, "skip_wiring")


def _aligned(name: str, size: str) -> REPA.Config | REPAE.Config:
    if name == "irepa":
        return REPA.Config(encoder_depth=EARLY_DEPTH[size], **IREPA)
    return (REPA if name == "repa" else REPAE).Config(encoder_depth=ENCODER_DEPTH[size])


def quickstart() -> TrainConfig:
    """A small DiverseDiT on 8 x 8 x 12 latents (16 tokens) that learns ten classes in minutes on two CPU cores.

    Six blocks are diverse enough to sit at the paper's threshold of 0.1; the lower one lets the weight act throughout.
    """
    return TrainConfig(
        model=replace(NANO, skip_wiring="input"),
        data=DataConfig(path="runs/quickstart/shards", shuffle_group=0, num_workers=0),
        methods=(DiverseDiT.Config(pairs="all", low=0.05),),
        optimizer=OptimizerConfig(lr=2e-3, beta2=0.95, warmup_steps=100, ema_decay=0.995),
        engine=EngineConfig(zero_stage=1, precision="fp32", global_batch=48),
        preview=PreviewConfig(every=500, count=20, num_steps=16, sampler="heun", cfg_scale=2.5),
        run=RunConfig(dir="runs/quickstart/train", steps=2000, log_every=20, checkpoint_every=500, keep_checkpoints=2),
    )


def small(
    name: str, methods: tuple[Any, ...] = (), objective: Any = None, model: Any = NANO, data: str = "", **preview: Any
) -> TrainConfig:
    """`quickstart` with other methods, another objective (not None) and another model; run.dir ends in `name`.

    "diversedit-..." has the DiverseDiT of `quickstart`, and its long skips where the model has some, before `methods`.
    data: other shards than its own. preview: keys of its group.
    """
    start = quickstart()
    if name.startswith("diversedit-"):
        methods = (*start.methods, *methods)
        model = replace(model, skip_wiring="input") if has_long_skips(model) else model
    return replace(
        start,
        model=model,
        data=replace(start.data, path=data or start.data.path),
        objective=objective or start.objective,
        methods=methods,
        preview=replace(start.preview, **preview),
        run=replace(start.run, dir=f"runs/quickstart/{name}"),
    )


# Aligned early in the model, as in the published settings, with a projector that does not outweigh the model; the class
# token is EfficientNet-Lite0's. Of quick-start size by name, as `small` takes it:
SMALL: dict[str, dict[str, Any]] = {
    "sit": {},
    "x": {"objective": X_PREDICTION},
    "jit": {"objective": X_PREDICTION, "model": JiT.Config(name="JiT-Nano/2")},
    "ddt": {"objective": Flow.Config(time="lognormal"), "model": DDT.Config(name="DDT-Nano/2")},
    "repa": {"methods": (REPA.Config(encoder_depth=2, projector_width=256),)},
    "irepa": {"methods": (REPA.Config(encoder_depth=2, **IREPA),)},
    "repa_e": {  # no file of LPIPS is at hand; a discriminator for 32 pixels
        "methods": (
            REPAE.Config(
                encoder_depth=2,
                projector_width=256,
                perceptual_weight=0.0,
                discriminator_width=16,
                discriminator_layers=2,
            ),
        )
    },
    "reg": {
        "methods": (REG.Config(encoder_depth=2, projector_width=256),),
        "model": replace(NANO, class_token=112),
    },
    "haste": {  # a transformer of local weights is needed: methods.haste.encoders
        "methods": (
            HASTE.Config(
                encoder_depth=2, projector_width=256, student_depths=(2, 3), teacher_depths=(11, 12), stop_step=1000
            ),
        )
    },
    "dispersive": {"methods": (Dispersive.Config(),)},
    "sra": {"methods": (SRA.Config(student_depth=2, teacher_depth=4, decay=0.995),)},
    "self_transcendence": {  # depths and lengths in the proportions of the published B
        "methods": (
            SelfTranscendence.Config(
                student_depth=3, teacher_depth=4, projector_width=256, stop_step=500, stage1_steps=1000, stage1_depth=1
            ),
        )
    },
    "internal_guidance": {"methods": (InternalGuidance.Config(),), "model": replace(NANO, auxiliary_depth=2)},
    "contrastive_flow": {"methods": (ContrastiveFlow.Config(),)},
    "layersync": {"methods": (LayerSync.Config(student_depths=(2,), teacher_depths=(4,)),)},
    "sra2": {"methods": (SRA2.Config(depth=2, head_width=256),)},
    "mean_flow": {
        "objective": MeanFlow.Config(),
        "model": replace(NANO, times=2),
        "sampler": "mean_flow",
        "num_steps": 1,
        "cfg_scale": 1.0,
    },
    "improved_mean_flow": {
        "objective": ImprovedMeanFlow.Config(),
        "model": replace(NANO, times=2, velocity_head=True, guidance_condition=True),
        "sampler": "mean_flow",
        "num_steps": 1,
        "cfg_scale": 1.0,
    },
    "lightningdit": {
        "objective": Flow.Config(time="lognormal", cosine_weight=1.0),
        "model": LightningDiT.Config(name="LightningDiT-Nano/2"),
    },
    "rae": {  # of EfficientNet-Lite0's tokens; one for 4 x 4 pixels
        "objective": Flow.Config(prediction="x", weighting="velocity", time_shift=0.0),
        "model": LightningDiT.Config(name="LightningDiT-Nano/1"),
        "data": "runs/quickstart/rae-shards",
    },
    "dit": {"objective": DDPM.Config(), "model": DiT.Config(name="DiT-Nano/2"), "sampler": "ddim"},
}
# those of SMALL that are also there with it
BESIDE_DIVERSEDIT = (
    "repa irepa repa_e reg haste dispersive sra self_transcendence mean_flow improved_mean_flow "
    "lightningdit rae jit ddt dit internal_guidance contrastive_flow layersync sra2"
)

PUBLISHED = {  # names of what runs together -> sizes, resolutions
    "sit diversedit repa diversedit-repa reg diversedit-reg sra diversedit-sra": ("b2 l2 xl2", (256, 512)),
    "irepa diversedit-irepa": ("b2 l2 xl2", (256,)),
    "haste diversedit-haste": ("b2 l2 xl2", (256,)),
    "repa_e diversedit-repa_e": ("b2 l2 xl2", (256,)),
    "dispersive": ("b2 l2 xl2", (256,)),
    "diversedit-dispersive diversedit-dispersive-sra": ("b2", (256,)),
    "lightningdit diversedit-lightningdit": ("b1 xl1", (256,)),
    "rae diversedit-rae": ("xl1", (256,)),
    "jit diversedit-jit": ("b16 l16 h16", (256,)),
    "ddt": ("b2 l2 xl2", (256, 512)),
    "repa-ddt": ("xl2", (256, 512)),
    "diversedit-ddt": ("b2 xl2", (256,)),
    "dit": ("s2 b2 l2 xl2", (256, 512)),
    "diversedit-dit": ("s2 b2 l2 xl2", (256,)),
    "sra-dit": ("xl2", (256,)),
    "mean_flow diversedit-mean_flow": ("b4 b2 l2 xl2", (256,)),
    "improved_mean_flow diversedit-improved_mean_flow": ("b2 l2 xl2", (256,)),
    "self_transcendence diversedit-self_transcendence": ("b2", (256,)),
    "internal_guidance diversedit-internal_guidance layersync diversedit-layersync": ("xl2", (256,)),
    "contrastive_flow repa-contrastive_flow": ("b2 xl2", (256,)),
    "sra2": ("b2 l2 xl2", (256,)),
    "diversedit-contrastive_flow diversedit-sra2": ("b2", (256,)),
}

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "quickstart": quickstart,
    **{f"quickstart-{name}": partial(small, name, **changes) for name, changes in SMALL.items()},
    **{
        f"quickstart-diversedit-{name}": partial(small, f"diversedit-{name}", **SMALL[name])
        for name in BESIDE_DIVERSEDIT.split()
    },
    **{
        f"{name}-{size}-{resolution}": partial(paper, name, size, resolution)
        for names, (sizes, resolutions) in PUBLISHED.items()
        for name in names.split()
        for size in sizes.split()
        for resolution in resolutions
    },
}


def load(recipe: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a recipe, or of a JSON file written by a run, with `key=value` overrides applied.

    Raises ConfigError for an unknown recipe (with the nearest name), an unreadable file or a wrong override.
    """
    if recipe in RECIPES:
        config = RECIPES[recipe]()
    elif recipe.endswith(".json"):
        config = read_config(Path(recipe))
    else:
        raise ConfigError(f"unknown recipe '{recipe}'{nearest(recipe, RECIPES)} (or the path of a .json configuration)")
    return changed(config, overrides)


if __name__ == "__main__":
    print(reference(TrainConfig), end="")
