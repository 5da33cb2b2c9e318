"""Every method and every kind of objective at toy size, alone and in pairs: what a run of it sets, on one data set.

The further backbones are no part of the pairs; `settings` takes one as the last of a cell.
"""

import itertools
import shutil

import numpy as np

from dit_fast.data import add_field
from dit_fast.methods import METHODS
from dit_fast.objectives import OBJECTIVES
from tests.helpers.encoder_weights import toy_encoder
from tests.helpers.tiny_vae import toy_vae

WIDTH = 6  # of the features and the class token
# What a part needs beside its name; a method that is not here runs with its defaults.
METHOD = {
    "diversedit": ("model.skip_wiring=input", "methods.diversedit.pairs=all", "methods.diversedit.low=0.01"),
    "repa": ("methods.repa.encoder_depth=2", "methods.repa.projector_width=8"),
    "repa_e": (
        "methods.repa_e.vae=diffusers:{vae}",
        "methods.repa_e.encoder_depth=2",
        "methods.repa_e.projector_width=8",
        "methods.repa_e.perceptual_weight=0",
        "methods.repa_e.discriminator_width=4",
        "methods.repa_e.discriminator_layers=2",
    ),
    "reg": ("methods.reg.encoder_depth=2", "methods.reg.projector_width=8", f"model.class_token={WIDTH}"),
    "haste": (
        "methods.haste.encoders=dinov2-vit-b:{encoder}",
        "methods.haste.encoder_depth=2",
        "methods.haste.projector_width=8",
        "methods.haste.student_depths=1,3",
        "methods.haste.teacher_depths=2,1",
    ),
    "sra": ("methods.sra.student_depth=2", "methods.sra.teacher_depth=3"),
    "self_transcendence": (
        "methods.self_transcendence.student_depth=2",
        "methods.self_transcendence.teacher_depth=3",
        "methods.self_transcendence.projector_width=8",
        "methods.self_transcendence.stage1_steps={steps}",
    ),
    "structure_guidance": ("methods.structure_guidance.projector_width=8",),
    "dispersive": ("methods.dispersive.depth=3",),
    "internal_guidance": ("model.auxiliary_depth=2",),
    "layersync": ("methods.layersync.student_depths=1,2", "methods.layersync.teacher_depths=3,4"),
    "sra2": ("methods.sra2.depth=2", "methods.sra2.head_width=8"),
}
PREDICTIONS = {
    "score": ("objective.prediction=score",),
    "noise": ("objective.prediction=noise",),
    "x": ("objective.prediction=x",),
    "vp": ("objective.path=vp", "objective.prediction=noise"),
}
OBJECTIVE = {
    "flow": (),
    **PREDICTIONS,
    "mean_flow": ("objective=mean_flow", "model.times=2"),
    "improved_mean_flow": (
        "objective=improved_mean_flow",
        "model.times=2",
        "model.velocity_head=true",
        "model.guidance_condition=true",
    ),
    "ddpm": ("objective=ddpm", "model=DiT-Nano/2"),
}
BACKBONE = {  # beside SiT, which has the cells
    "lightningdit": ("model=LightningDiT-Nano/2", "objective.time=lognormal", "objective.cosine_weight=1"),
    "jit": ("model=JiT-Nano/2", "objective.prediction=x", "objective.weighting=velocity"),
    "ddt": ("model=DDT-Nano/2", "model.encoder_depth=2", "objective.time=lognormal"),
}


def parts():
    """Names of all parts: first what replaces flow matching, then the methods."""
    kinds = [name for name in OBJECTIVE if name != "flow" and name in {*OBJECTIVES, *PREDICTIONS}]
    return [*kinds, *(name for name in OBJECTIVES if name not in OBJECTIVE), *METHODS]


def cells():
    """Each part alone and each pair that is not of two objectives, in one order; "flow" is what stands alone."""
    objectives = [name for name in parts() if name not in METHODS]
    pairs = [pair for pair in itertools.combinations(parts(), 2) if not set(pair) <= set(objectives)]
    return [("flow",), *((name,) for name in parts()), *pairs]


def settings(cell, steps):
    """`key=value` of a run of these parts, four blocks of width 32, of `steps` steps in each of its stages."""
    replaced = [name for name in cell if name not in METHODS]
    methods = [name for name in cell if name in METHODS]
    chosen = [text for name in replaced for text in {**OBJECTIVE, **BACKBONE}.get(name, (f"objective={name}",))]
    values = {
        "steps": steps,
        **({"encoder": toy_encoder()} if "haste" in methods else {}),
        **({"vae": toy_vae()} if "repa_e" in methods else {}),
    }
    needed = [text.format(**values) for name in methods for text in METHOD.get(name, ())]
    lines = [
        f"run.steps={steps}",
        f"methods={','.join(methods) or 'none'}",
        "model.skip_wiring=off",
        "model.depth=4",
        "model.hidden_size=32",
        "model.num_heads=2",
        *chosen,
        *needed,
    ]
    return [line for line in lines if "ddt" not in cell or not line.startswith("model.skip_wiring")]


def add_tokens(shards, folder):
    """A copy of a toy data set, in folder, with features of four tokens, a class token and images beside them."""
    generator = np.random.default_rng(0)
    place = shutil.copytree(shards, folder / "with-tokens")
    for name, shape in (("features", (48, 4, WIDTH)), ("class_token", (48, WIDTH))):
        np.save(folder / f"{name}.npy", generator.standard_normal(shape, np.float32))
        add_field(place, name, folder / f"{name}.npy", progress=False)
    np.save(folder / "image.npy", generator.integers(0, 256, (48, 3, 16, 16), np.uint8))
    add_field(place, "image", folder / "image.npy", progress=False)
    return place
