"""The plan of a run on many GPUs: its factors have sources, its bytes are those that traced ranks send.

`python -m tests.train.test_scaling` writes the tables and the picture of docs/scaling.md.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

from dit_fast.cli import main
from dit_fast.recipes import load
from dit_fast.runs import EngineConfig
from dit_fast.train import scaling
from dit_fast.train.memory import Planner
from tests.helpers.no_gpu import no_gpu  # noqa: F401
from tests.helpers.toy_runs import ROOT, Ranks

PAGE, PICTURE = ROOT / "docs/scaling.md", ROOT / "docs/scaling.png"
ENCODER = 12 * 257 * (24 * 768**2 + 4 * 257 * 768)  # FLOPs of DINOv2-B's blocks on one image, forward
PUBLISHED = {  # images/s of one GPU: recipe, samples of each GPU, GPU, FLOPs of a sample beside the model's
    "LightningDiT-XL/1, H800": (285, "lightningdit-xl1-256", 128, "h800", 0),
    "B/1 of 140 M parameters, H100": (237, "lightningdit-b1-256", 128, "h100", ENCODER),
}
ALL = (8, 16, 32, 64, 128, 256, 512, 1024)


@pytest.mark.launch
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_the_plans_bytes_are_those_of_traced_ranks(tmp_path, ranks):
    with Ranks([tmp_path / "out.json"], tmp_path / "log", ranks, ("-m", "tests.train.traffic_worker")) as job:
        assert job.wait(500) == [0] * ranks, job.text()[-3000:]
    traced = json.loads((tmp_path / "out.json").read_text())
    assert len(traced) == 10
    for name, found in traced.items():
        engine, count = name.split(", ")
        key = {"name": "ddp"} if engine == "ddp" else {"zero_stage": int(engine[-1])}
        trained, planned_save = sum(found["sizes"]), scaling.saved(EngineConfig(**key), found["sizes"], ranks)
        assert max(found["saved"]) == pytest.approx(planned_save, abs=16 * 2 * ranks), name  # DeepSpeed's alignment
        assert sum(found["saved"]) == 16 * trained, name
        planned = scaling.traffic(EngineConfig(**key), trained, int(count))
        sent = {kind.removesuffix("_base"): size for kind, size in found["bytes"].items()}
        small = sent.pop("small", 0)
        assert sent.keys() == planned.keys(), name
        for kind, size in planned.items():  # stage 3 gathers small parameters one by one
            assert sent[kind] == pytest.approx(size, rel=0.03 if engine == "ZeRO-3" else 0), (name, kind)
        assert small < 0.02 * trained * 4, name


def measured(side):
    """By case, of the recorded step on an H200."""
    record = json.loads((ROOT / "benchmarks/results/nvidia-h200/first_run/step_c4cc395.json").read_text())
    return {case["name"]: case["parts"]["step"]["sides"][side] for case in record["cases"]}


def test_measured_factors_are_those_of_the_record():
    sides = measured("dit_fast, all pairs")
    rate = sides["B/2 b256 bf16"]["flops_per_s"] / scaling.GPUS["h200"].bf16
    assert pytest.approx(rate, abs=5e-4) == scaling.UTILISATION
    for name, blocks in (("B/2 b32 bf16", 12), ("XL/2 b32 bf16", 28)):
        assert scaling.HOST + blocks * scaling.HOST_BLOCK == pytest.approx(sides[name]["host_s"])


def test_times_follow_from_flops_bytes_and_links():
    config = load("quickstart", ["model.input_size=8", "model.in_channels=4", "model.num_classes=10"])
    config = dataclasses.replace(config, engine=EngineConfig(global_batch=64))
    planner = Planner(config)
    alone, link = scaling.plan(planner, 1, scaling.GPUS["h800"], 8), 200e9 * 0.8
    assert (alone.exposed, alone.engine) == (0, "one process")
    assert alone.compute == pytest.approx(scaling.HOST + 6 * scaling.HOST_BLOCK)  # small: the host decides
    eight = scaling.plan(planner.over(config.engine, 8), 8, scaling.GPUS["h800"], 8)
    assert eight.exposed == pytest.approx((2 + 1) * 7 / 8 * 4 * planner.trained / link)
    assert eight.hours == pytest.approx(eight.seconds * config.run.steps * 8 / 3600)
    assert eight.copying == pytest.approx(16 * planner.trained / 8 / 55.63e9, rel=1e-4)
    far = scaling.plan(planner.over(config.engine, 8), 8, scaling.GPUS["h800"], 2)  # two adapters for each machine
    assert far.exposed == pytest.approx(eight.exposed * link / (2 * 43e9))


def test_the_command_says_what_cannot_be_shared(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # away from a quick start's data set, if this checkout has one
    sizes = ["model.input_size=8", "model.in_channels=4", "model.num_classes=10", "engine.global_batch=64"]
    assert main(["info", "--plan", "quickstart", *sizes, "--gpus", "2,128"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("A plan, not a measurement: SiT-Nano")
    for engine in ("DDP", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3"):
        assert f"| 2 | {engine} | 32 |" in text
    assert "| 128 | cannot: engine.global_batch=64 does not divide over 128 ranks" in text
    assert main(["info", "engine.global_batch=8"]) == 2
    assert "--plan RECIPE" in capsys.readouterr().err


def tables():
    """By name, those of docs/scaling.md."""
    grown = scaling.report(load("diversedit-xl2-256", []), ALL, "h800", 8, per_gpu=32)
    lines = [
        "| published | images/s of one GPU | the plan | plan / published | at a published program's share "
        "| that / published | share that it implies |",
        "|---|---|---|---|---|---|---|",
    ]
    theirs = measured("as published")["B/2 b256 bf16"]["flops_per_s"]
    for name, (images, recipe, samples, gpu, beside) in PUBLISHED.items():
        config, kind = load(recipe, []), scaling.GPUS[gpu]
        first = scaling.plans(config, [8], kind, 8, samples)[0]
        flops = 3 * Planner(config).loss.model.flops_per_sample() + beside
        cells = [f"{planned:.0f} | {planned / images:.2f}" for planned in (first.images / 8, theirs / flops)]
        lines.append(f"| {name} | {images} | {' | '.join(cells)} | {images * flops / kind.bf16:.1%} |")
    return {"grown": grown, "published": "\n".join(lines)}


def picture(path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = scaling.plans(load("diversedit-xl2-256", []), ALL, scaling.GPUS["h800"], 8, per_gpu=32)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    styles = dict(zip(dict.fromkeys(row.engine for row in rows), ("o-", "s--", "^-", "v--", "D:"), strict=True))
    for engine, style in styles.items():
        mine = [row for row in rows if row.engine == engine]
        gpus = [row.gpus for row in mine]
        left.plot(gpus, [row.images / row.gpus for row in mine], style, label=engine, markersize=5)
        right.plot(gpus, [row.memory / 1e9 for row in mine], style, label=engine, markersize=5)
    for axis, label in ((left, "images/s of each GPU"), (right, "GB on each GPU")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ALL, [str(n) for n in ALL])
        axis.set(xlabel="GPUs", ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle("Planned, not measured: DiverseDiT-XL/2, H800, 32 samples on each GPU")
    figure.savefig(path, dpi=110)


@pytest.mark.long
def test_the_documented_tables_are_the_plan():
    page = PAGE.read_text()
    assert all(text in page for text in tables().values())


if __name__ == "__main__":
    text = PAGE.read_text()
    for name, made in tables().items():
        text = re.sub(
            f"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda found, made=made: found[1] + made + "\n" + found[2],
            text,
            flags=re.S,
        )
    PAGE.write_text(text)
    picture(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
