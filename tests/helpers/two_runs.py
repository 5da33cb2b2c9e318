"""Two tiny runs made by the real trainer on real shards, and what they draw."""

import numpy as np

from dit_fast.checkpoint.run import load_run
from dit_fast.preparation.build import build_shards
from dit_fast.recipes import load
from dit_fast.sampling.images import sample_images
from dit_fast.sampling.options import SampleOptions
from dit_fast.sampling.samples import Samples
from dit_fast.train.loop import train
from dit_fast.world import single

STEPS = 4
FAST = {"num_steps": 2, "cfg_scale": 1.0, "chunk": 4}


def sample_run(folder, **options):
    """All images of a run folder, with two cheap steps unless the options say otherwise."""
    chosen = SampleOptions(**{**FAST, **options})
    return Samples.join(sample_images(load_run(folder, weights=chosen.weights), chosen, single()))


def make_two_runs(folder):
    """Shards of 3 classes, `diverse` (DiverseDiT) and `plain` (SiT), both trained for a few steps, with samples."""
    rng = np.random.default_rng(0)
    labels = np.arange(36) % 3
    images = (rng.integers(0, 60, (36, 32, 32, 3)) + 60 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(folder / "toy.npz", images=images, labels=labels, class_names=np.array(["dark", "grey", "light"]))
    build_shards(folder / "toy.npz", folder / "shards", autoencoder="pca", size=32, progress=False)
    common = [
        f"data.path={folder / 'shards'}", f"run.steps={STEPS}", "run.log_every=2", "run.checkpoint_every=2",
        "engine.global_batch=12", "preview.every=0", "run.tensorboard=false",
    ]  # fmt: skip
    for name, changes in (("diverse", []), ("plain", ["methods=none", "model.skip_wiring=off"])):
        train(load("quickstart", [*common, *changes, f"run.dir={folder / name}"]), single())
        sample_run(folder / name, per_class=2).save(folder / name / "samples.npz")
    return folder
