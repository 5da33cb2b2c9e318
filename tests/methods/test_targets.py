"""Alignment with several encoders, stored or run while training, and the options of iREPA, on real shards."""

import dataclasses
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dit_fast.data import open_dataset
from dit_fast.data.added import add_field
from dit_fast.encoders import load_encoder
from dit_fast.errors import UserError
from dit_fast.methods import build_methods
from dit_fast.methods.irepa import spatial_normalize
from dit_fast.methods.reg import REG
from dit_fast.methods.repa import REPA, repa_loss
from dit_fast.models import build_model
from dit_fast.train.__main__ import main
from tests.helpers.encoder_weights import WIDTH, official
from tests.helpers.golden import assert_close
from tests.helpers.no_gpu import no_gpu  # noqa: F401
from tests.helpers.shard_sets import everything
from tests.helpers.toy_runs import Ranks, arguments, losses, rows, tensors

GRID = 2  # tokens a side
SMALL = ("methods=repa", "methods.repa.encoder_depth=2", "methods.repa.projector_width=8", "model.skip_wiring=off")
SIZES = {"input_size": 4, "in_channels": 12, "hidden_size": 32, "depth": 3, "num_heads": 2, "num_classes": 3}


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    """A DINO and a DINOv2 with registers, tiny."""
    folder = tmp_path_factory.mktemp("encoders")
    for name in ("dino-vit-b", "dinov2-vit-b-reg"):
        torch.save(official(name), folder / f"{name}.pth")
    return tuple(f"{name}:{folder / name}.pth" for name in ("dino-vit-b", "dinov2-vit-b-reg"))


@pytest.fixture(scope="module")
def stored(built, specs, tmp_path_factory):
    """The shards with what both give of the images, float32."""
    folder = tmp_path_factory.mktemp("stored")
    place = shutil.copytree(built, folder / "shards")
    images = everything(built, ("image",))["image"].float() / 127.5 - 1
    for spec, end in zip(specs, ("", "_b"), strict=True):
        for name, value in load_encoder(spec)(images, GRID).items():
            np.save(folder / "array.npy", value.numpy())
            add_field(place, f"{name}{end}", folder / "array.npy", progress=False)
    return place


def on_the_way(specs):
    return f"methods.repa.encoders={','.join(specs)}"


def bound(config, data, **sizes):
    torch.manual_seed(0)
    model = build_model("SiT-Nano/2", **{**SIZES, **sizes})
    (method,) = build_methods([config], model, data)
    return model, method


def test_made_on_the_way_they_are_what_the_shards_would_hold(built, stored, specs, tmp_path):
    read, made = tmp_path / "read", tmp_path / "made"
    assert main(arguments(stored, read, *SMALL, "methods.repa.fields=features,features_b", "run.steps=3")) == 0
    assert main(arguments(built, made, *SMALL, on_the_way(specs), "run.steps=3")) == 0
    names = {"repa/alignment", "repa/alignment_0", "repa/alignment_1"}
    for ours, theirs in zip(rows(made), rows(read), strict=True):
        assert names <= ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert ours["repa/alignment"] == pytest.approx(
            (ours["repa/alignment_0"] + ours["repa/alignment_1"]) / 2, abs=1e-6
        )
    heads = {name for name in tensors(made, 3) if "model/projectors" in name}
    assert {name.split(".")[1] for name in heads} == {"0", "1"}
    assert not any("encoder" in name for name in tensors(made, 3))  # frozen: in no checkpoint and no optimizer


def test_a_run_resumes_exactly_and_only_with_the_same_weights(built, specs, tmp_path, capsys):
    once, again = tmp_path / "once", tmp_path / "again"
    start = [*SMALL, on_the_way(specs), "engine.precision=bf16", "run.checkpoint_every=2"]
    assert main(arguments(built, once, *start, "run.steps=4")) == 0
    assert main(arguments(built, again, *start, "run.steps=2")) == 0
    moved = tmp_path / "moved.pth"
    shutil.copy(specs[0].partition(":")[2], moved)
    start[-3] = on_the_way((f"dino-vit-b:{moved}", specs[1]))
    assert main(arguments(built, again, *start, "run.steps=4")) == 0
    assert losses(once) == losses(again)
    first, second = tensors(once, 4), tensors(again, 4)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = official("dino-vit-b")
    other["norm.bias"] += 1
    torch.save(other, moved)
    assert main(arguments(built, again, *start, "run.steps=5")) == 2
    assert "methods.repa.encoders.0: its weights have the sha256" in capsys.readouterr().err
    start[-3] = on_the_way(specs[:1])
    assert main(arguments(built, again, *start, "run.steps=5")) == 2
    assert re.search(r"encoders.1: .*step_0+4 was trained with it; restore the conf", capsys.readouterr().err)


def test_several_encoders_have_a_projector_each_and_their_mean_counts(specs, stored):
    info = open_dataset(stored).info
    config = REPA.Config(encoder_depth=2, projector_width=8, weight=0.7, fields=("features_b", "features"))
    model, method = bound(config, info)
    assert list(model.projectors) == method.heads
    batch = everything(stored, method.fields)
    feature = torch.randn(len(batch["label"]), GRID**2, 32)
    term = method.terms(SimpleNamespace(features={1: feature}, batch=batch))["repa/alignment"]
    each = [repa_loss(model.projectors[i](feature), batch[name]) for i, name in enumerate(("features_b", "features"))]
    assert_close(term.value, (each[0] + each[1]) / 2, 1e-6)
    assert (term.weight, list(term.logs)) == (0.7, ["repa/alignment_0", "repa/alignment_1"])
    assert torch.equal(term.logs["repa/alignment_1"], each[1])


def test_from_the_stop_on_no_encoder_runs(built, specs):
    info = open_dataset(built).info
    _, method = bound(REPA.Config(encoder_depth=2, encoders=specs), info)
    batch = everything(built, ("image",))
    assert set(method.complete(batch, active=True)) == {"repa.features_0", "repa.features_1"}
    assert method.complete(batch, active=False) == {}
    method.release()
    assert method.targets.encoders == []


def test_reg_makes_its_class_token_on_the_way(built, stored, specs):
    infos = [open_dataset(place).info for place in (built, stored)]
    sizes = {"encoder_depth": 2, "projector_width": 8}
    _, made = bound(REG.Config(encoders=specs[1:], **sizes), infos[0], class_token=WIDTH)
    other = REG.Config(fields=("features_b",), class_token_field="class_token_b", **sizes)
    _, read = bound(other, infos[1], class_token=WIDTH)
    assert (made.fields, read.fields) == (("image",), ("features_b", "class_token_b"))
    batch, theirs = everything(built, made.fields), everything(stored, read.fields)
    made.release()  # from a stop on the token is still denoised
    batch |= made.complete(batch, active=False)
    tokens = [method.state(torch.zeros(1), each, None) for method, each in ((made, batch), (read, theirs))]
    assert_close(tokens[0]["class_token"], tokens[1]["class_token"], 1e-5)
    losses = {"class_token": torch.ones(2)}
    feature = {1: torch.randn(len(batch["label"]), 1 + GRID**2, 32)}
    values = [
        method.terms(SimpleNamespace(features=feature, batch=each, losses=losses))["reg/alignment"].value
        for method, each in ((made, batch), (read, theirs))
    ]
    assert_close(*values, 1e-5)


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        (REPA.Config(encoders=("dino-vit-b:/nowhere",), encoder_depth=2), {}, "/nowhere: no such checkpoint file"),
        (REPA.Config(encoders=("dino",), encoder_depth=2), {}, "unknown encoder 'dino'"),
        (REPA.Config(encoders=("SPEC",), encoder_depth=2), {"input_width": 8}, "2 x 4 tokens, an encoder gives"),
        (REPA.Config(fields=("features", "features"), encoder_depth=2), {}, "features,features: give each"),
        (REPA.Config(fields=(), encoder_depth=2), {}, "methods.repa.fields=: give each field once, at least one"),
        (REPA.Config(fields=("image",), encoder_depth=2), {}, "'image' holds .3, 16, 16. per image, not tokens"),
        (REPA.Config(fields=("features_c",), encoder_depth=2), {}, "no field 'features_c' in the shards"),
        (REPA.Config(fields=("features_c",), encoders=("SPEC",), encoder_depth=2), {}, "fields=features_c is not read"),
        (REG.Config(encoders=("SPEC", "SPEC"), encoder_depth=2), {}, "reg denoises the class token of one encoder"),
        (REG.Config(encoders=("SPEC",), encoder_depth=2), {"class_token": 3}, "set model.class_token=128"),
        (REG.Config(class_token_field="features", encoder_depth=2), {"class_token": 3}, "'features' holds .4, 1"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_the_first_step(config, sizes, message, stored, specs):
    config = dataclasses.replace(config, encoders=tuple(each.replace("SPEC", specs[0]) for each in config.encoders))
    with pytest.raises(UserError, match=message) as caught:
        bound(config, open_dataset(stored).info, **sizes)
    assert "\n" not in str(caught.value)


def test_shards_without_images_are_refused(shards, specs, tmp_path, capsys):
    assert main(arguments(shards, tmp_path / "run", *SMALL, on_the_way(specs))) == 2
    error = capsys.readouterr().err
    assert "no field 'image' in the shards" in error
    assert "add it with `dit-fast shards add-features FOLDER image`" in error


def test_convolution_and_spatial_normalisation(stored):
    """A class token is left out; the grid need not be square."""
    info = open_dataset(stored).info
    _, method = bound(REPA.Config(encoder_depth=2, projector="conv", spatial_norm=0.6), info)
    target, feature = torch.randn(3, 4, WIDTH), torch.randn(3, 5, 32)
    term = method.terms(SimpleNamespace(features={1: feature}, batch={"features": target}))["repa/alignment"]
    (head,) = method.heads
    assert [name for name, _ in head.named_parameters()] == ["projection_layer.weight", "projection_layer.bias"]
    assert_close(term.value, repa_loss(head(feature[:, 1:]), spatial_normalize(target, 0.6)), 1e-6)
    tokens = SimpleNamespace(field=lambda name: SimpleNamespace(shape=(8, WIDTH)))
    model, method = bound(REPA.Config(encoder_depth=2, projector="conv"), tokens, input_width=8)
    feature = torch.randn(1, 8, 32)
    weight = model.projectors[0].projection_layer
    expected = weight(feature.transpose(1, 2).reshape(1, 32, 2, 4)).flatten(2).transpose(1, 2)
    assert_close(method.heads[0](feature), expected, 1e-6)


@pytest.mark.launch
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), 3])  # 3 partitions what is frozen, too
def test_two_ranks_run_frozen_encoders_of_their_own(stage, built, specs, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    start = [*SMALL, "methods.repa.projector=conv", on_the_way(specs), "run.steps=2", f"engine.zero_stage={stage}"]
    assert main(arguments(built, alone, *start)) == 0
    with Ranks(arguments(built, shared, *start), tmp_path / "log.txt") as ranks:
        assert ranks.wait() == [0, 0], ranks.text()[-3000:]
    for ours, theirs in zip(rows(shared), rows(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("beside", ["", "diversedit,", "reg,"])
def test_irepa_trains_alone_and_beside_others(beside, stored, tmp_path):
    options = ["methods.repa.encoder_depth=2", "methods.repa.projector=conv", "methods.repa.spatial_norm=0.6"]
    if beside == "reg,":
        options += ["methods.reg.encoder_depth=2", f"model.class_token={WIDTH}"]
    run = tmp_path / "run"
    assert main(arguments(stored, run, f"methods={beside}repa", *options, "run.steps=2", "run.checkpoint_every=1")) == 0
    first, last = tensors(run, 1), tensors(run, 2)
    (head,) = [name for name in last if name.startswith("model/") and name.endswith("projection_layer.weight")]
    assert not torch.equal(first[head], last[head])
    assert all(np.isfinite(row["repa/alignment"]) for row in rows(run))
