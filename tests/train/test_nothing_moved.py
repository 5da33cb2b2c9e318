"""What was recorded before the seams were opened (commit 32b3b15) comes out again: curves, a resumed run, samples.

`python -m tests.train.test_nothing_moved`, run at that commit, wrote `tests/data/before_seams`: shards of 4 x 4 x 12
latents with features (the results of LAPACK and of an encoder differ between machines, so the shards are kept), the
rows of 50 float32 steps by name, and a run folder of 20 steps, all without compiled ops. Bits are compared where the
processor has the vector instructions and the maker that it had there, by which MKL chooses its products, else 1e-5, and
2e-5 of one for DiverseDiT's terms, small sums of what cancels.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_fast import backend
from dit_fast.cli import main as command
from dit_fast.models.registry import PRESETS
from dit_fast.train.__main__ import main as train

BEFORE = Path(__file__).parents[1] / "data" / "before_seams"
PRESETS["SiT-Before/2"] = {"hidden_size": 24, "depth": 4, "num_heads": 2, "patch_size": 2}
SMALL = ("model.name=SiT-Before/2", "preview.every=0")
REPA = ("methods.repa.encoder_depth=2", "methods.repa.projector_width=16")
CURVES = {
    "quickstart": ("preview.every=0",),
    "sit": (*SMALL, "methods=none", "model.skip_wiring=off"),
    "diversedit": (*SMALL, "methods=diversedit", "methods.diversedit.pairs=release", "model.skip_wiring=output"),
    "repa": (*SMALL, "methods=repa", *REPA, "model.skip_wiring=off"),
}
RUN = (*SMALL, "methods=diversedit,repa", *REPA, "methods.diversedit.pairs=random_layers", "methods.diversedit.k=3")
CLOCK = ("seconds", "samples_per_s", "mfu")


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    makers = [line.split()[-1] for line in lines if line.startswith("vendor_id")]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *makers[:1]])


def start(run, steps, *overrides):
    fixed = {
        "data.path": BEFORE / "shards",
        "run.dir": run,
        "run.steps": steps,
        "run.log_every": 1,
        "run.checkpoint_every": 0,
        "run.keep_checkpoints": 1,
        "run.tensorboard": "false",
        "engine.global_batch": 8,
        "engine.micro_batch": 4,
    }
    assert train(["quickstart", *(f"{key}={value}" for key, value in fixed.items()), *overrides]) == 0
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCK} for line in lines]


def draw(run, path):
    options = ["--classes", "0,2", "--per-class", "2", "--num-steps", "4", "--data", str(BEFORE / "shards")]
    assert command(["sample", str(run), "--out", str(path), *options]) == 0
    with np.load(path) as file:
        return file["arr_0"].astype(int)


def same(rows, name):
    recorded = json.loads((BEFORE / "curves.json").read_text())
    expected = recorded["curves"][name]
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        if recorded["cpu"] == processor():
            assert row == wanted
        else:
            cancels = {key: 2e-5 if key.startswith("diversedit/") else 1e-7 for key in wanted}
            assert row == {key: pytest.approx(value, rel=1e-5, abs=cancels[key]) for key, value in wanted.items()}


@pytest.fixture(autouse=True)
def _as_recorded():
    with backend.force("torch"):
        yield


@pytest.mark.parametrize("name", CURVES)
def test_fifty_steps(name, tmp_path):
    same(start(tmp_path / "run", 50, *CURVES[name]), name)


def test_a_run_of_before_resumes_and_samples(tmp_path):
    shutil.copytree(BEFORE / "run", tmp_path / "run")
    images = draw(tmp_path / "run", tmp_path / "images.npz")
    with np.load(BEFORE / "images.npz") as file:
        assert np.abs(images - file["arr_0"].astype(int)).max() <= 1
    same(start(tmp_path / "run", 30, *RUN), "resumed")


def record(work):
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from dit_fast.data.build import build_shards
    from tests.helpers.toy_runs import CLASSES

    rng = np.random.default_rng(5)
    labels = np.arange(24) % len(CLASSES)
    y, x = np.mgrid[0:16, 0:16] / 16
    wave = (np.sin(6 * x + 2.0 * labels[:, None, None]) * np.cos(5 * y))[..., None] * rng.uniform(0.2, 1, (24, 1, 1, 3))
    images = (127.5 + 120 * wave + rng.normal(0, 3, (24, 16, 16, 3))).clip(0, 255).astype(np.uint8)
    np.savez(work / "pictures.npz", images=images, labels=labels, class_names=np.array(CLASSES))
    build = {"autoencoder": "pca", "encoder": "efficientnet-lite0", "size": 16, "samples_per_shard": 12}
    build_shards(work / "pictures.npz", BEFORE / "shards", **build, progress=False)
    curves = {name: start(work / name, 50, *overrides) for name, overrides in CURVES.items()}
    start(work / "run", 20, *RUN)
    shutil.copytree(work / "run", BEFORE / "run")
    draw(work / "run", BEFORE / "images.npz")
    curves["resumed"] = start(work / "run", 30, *RUN)
    content = {"cpu": processor(), "torch": torch.__version__, "curves": curves}
    (BEFORE / "curves.json").write_text(json.dumps(content, indent=0))


if __name__ == "__main__":
    torch.set_num_threads(1)
    record(Path(sys.argv[1]))
