"""Files and dictionaries of other training codes: names with wrappers, odd entries, damage."""

import argparse
import datetime
import re
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dit_fast.checkpoint import export_official, load_official, read_published, save_official
from dit_fast.diffusion import sample
from dit_fast.errors import CheckpointError, ConfigError, UserError
from tests.helpers.cases import loop_over
from tests.helpers.deterministic_fill import tiny_state
from tests.helpers.golden import assert_same_state


def test_legacy_and_wrapped_names():
    state = {key: value.float() for key, value in tiny_state("off").items()}
    legacy = {}
    for key, value in state.items():
        block = int(key.split(".")[1]) if key.startswith("blocks.") else -1
        legacy[key if block < 2 else key.replace(f"blocks.{block}.", f"decoder_blocks.{block - 2}.")] = value
    assert_same_state(export_official(load_official(legacy, "repa", num_heads=4, encoder_depth=2)), state)
    with pytest.raises(CheckpointError, match=r"decoder_blocks.*encoder_depth"):
        load_official(legacy, "repa", num_heads=4)
    with pytest.raises(CheckpointError, match="encoder_depth=1"):
        load_official(legacy, "repa", num_heads=4, encoder_depth=1)
    with pytest.raises(CheckpointError, match=r"missing key 'blocks\.2"):
        load_official(legacy, "repa", num_heads=4, encoder_depth=3)
    for call, message in (
        ({"family": "repa", "encoder_depth": 99}, r"encoder_depth=99 is not one of the checkpoint's blocks 1\.\.4"),
        ({"family": "repa", "in_context_start": 1}, "in_context_start=1 is for family 'jit', not 'repa'; drop it"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_official(state, num_heads=4, **call)
    for outer, inner in (
        ("module._orig_mod.", "_orig_mod."),
        ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.module."),
    ):
        wrapped = {outer + key.replace("blocks.1.", f"blocks.1.{inner}"): value for key, value in state.items()}
        assert_same_state(export_official(load_official(wrapped, "repa", num_heads=4)), state)
    with pytest.raises(CheckpointError, match="wrapper"):
        load_official({**state, "module.pos_embed": state["pos_embed"]}, "repa", num_heads=4)


def _training_checkpoint():
    ema = {key: value.float() for key, value in tiny_state("off").items()}
    model = {key: value + 1 for key, value in ema.items()}
    args = argparse.Namespace(exp_name="linear-dinov2-b", encoder_depth=8, cfg_prob=0.1, resume_step=0, data_dir=None)
    return {"model": model, "ema": ema, "opt": {"state": {}, "param_groups": []}, "args": args, "steps": 50_000}


def test_a_model_says_what_it_was_trained_for(tmp_path):
    content = _training_checkpoint()
    content["args"].path_type = "GVP"
    model = load_official(content, "repa", num_heads=4)
    model.prediction = "noise"
    save_official(model, tmp_path / "model.safetensors")
    again = load_official(tmp_path / "model.safetensors", "repa")
    assert (model.path, again.path, again.prediction) == ("cosine", "cosine", "noise")
    assert load_official(_training_checkpoint(), "repa", num_heads=4).path is None


def test_training_checkpoints_give_ema_or_model(tmp_path):
    content = _training_checkpoint()
    path = tmp_path / "0050000.pt"
    torch.save(content, path)
    assert_same_state(export_official(load_official(path, "repa", num_heads=4)), content["ema"])
    assert_same_state(export_official(load_official(str(path), "repa", num_heads=4, weights="model")), content["model"])
    assert read_published(path)["args"].encoder_depth == 8
    with pytest.raises(CheckpointError, match="weights='model'"):
        load_official({"model": content["model"]}, "repa", num_heads=4)
    with pytest.raises(ConfigError, match="weights"):
        load_official(path, "repa", num_heads=4, weights="latest")


class _Payload:
    pass


def test_files_that_are_not_checkpoints_are_refused_in_one_line(tmp_path):
    whole = _training_checkpoint()
    torch.save({"model": _Payload()}, tmp_path / "class.pt")
    torch.save({**whole, "args": _Payload()}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({**whole, "args": range(3)}, tmp_path / "range.pt")
    torch.save(whole, tmp_path / "protocol.pt", pickle_protocol=4)
    torch.save(whole, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:5000])
    save_file(whole["ema"], tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-100])
    (tmp_path / "text.pt").write_text("<html>not found</html>")
    (tmp_path / "text.safetensors").write_text("<html>not found</html>")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    (tmp_path / "empty.pt").touch()
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"steps": 3}, tmp_path / "bare.pt")
    (tmp_path / "folder").mkdir()
    reasons = {
        "class.pt": "test_foreign_files._Payload'",
        "legacy.pt": "test_foreign_files._Payload'",
        "range.pt": "range'",
        "protocol.pt": "protocol",
        "cut.pt": "",
        "text.pt": "",
        "text.safetensors": "safetensors",
        "cut.safetensors": "safetensors",
        "model.safetensors.index.json": "several files",
        "empty.pt": "is empty",
        "archive.pt": "",
        "list.pt": "a list",
        "bare.pt": "first keys: steps",
        "folder": "is a folder",
        "absent.pt": "no such",
    }
    for name, reason in reasons.items():
        with pytest.raises(CheckpointError, match=f"{re.escape(name)}: .*{re.escape(reason)}") as caught:
            load_official(tmp_path / name, "repa", num_heads=4)
        assert not set("\n\x1b") & set(str(caught.value)), name


def test_plain_values_beside_the_weights_are_no_obstacle(tmp_path):
    values = {
        "dir": Path("/data"), "lr": np.float64(1e-4), "steps": np.int64(3), "stats": np.zeros(2),
        "dtype": torch.float32, "device": torch.device("cpu"),
        "date": datetime.date(2024, 1, 1), "betas": (0.9, 0.999), "counts": {"a": {1}},
    }  # fmt: skip
    content = {**_training_checkpoint(), "args": argparse.Namespace(**values), "step": torch.tensor(5)}
    torch.save(content, tmp_path / "a.pt")
    assert_same_state(export_official(load_official(tmp_path / "a.pt", "repa", num_heads=4)), content["ema"])
    assert read_published(tmp_path / "a.pt")["args"].lr == 1e-4
    assert read_published(tmp_path / "a.pt")["args"].dir == PurePosixPath("/data")


@loop_over("where", ["state_dict", "module"])
def test_state_dicts_of_other_trainers(where):
    """Lightning and DeepSpeed; a trainer that is itself a module puts its attribute's name before each parameter."""
    content = _training_checkpoint()
    assert_same_state(
        export_official(load_official({where: content["ema"], "epoch": 1}, "repa", num_heads=4)), content["ema"]
    )
    owned = {f"{owner}.{name}": value for owner in ("ema", "model") for name, value in content[owner].items()}
    for weights in ("ema", "model"):
        model = load_official({where: owned, "epoch": 1}, "repa", num_heads=4, weights=weights)
        assert_same_state(export_official(model), content[weights])
    with pytest.raises(CheckpointError, match="'vae' beside 'ema"):
        load_official({where: {**owned, "vae": torch.zeros(1)}}, "repa", num_heads=4)


def test_averaged_weights_are_found_beside_a_state_dict():
    """The weights that were asked for are never those that merely stand under a better known name."""
    content = _training_checkpoint()
    for average, raw in (("ema", "state_dict"), ("ema", "module"), ("state_dict_ema", "state_dict"),
                         ("ema_state_dict", "model_state_dict"), ("model_ema", "model")):  # fmt: skip
        file = {raw: content["model"], average: content["ema"]}
        for weights in ("ema", "model"):
            model = load_official(file, "repa", num_heads=4, weights=weights)
            assert_same_state(export_official(model), content[weights])
    settings = {"state_dict": content["model"], "ema": {"decay": 0.999}}
    assert_same_state(export_official(load_official(settings, "repa", num_heads=4)), content["model"])
    with pytest.raises(CheckpointError, match=r"nor under .*first keys: net"):
        load_official({"net": content["model"]}, "repa", num_heads=4)


@loop_over(
    ("arguments", "reason"),
    [
        ({"source": None}, "a NoneType is no checkpoint"),
        ({"num_heads": 10**400}, "num_heads='1000"),
        ({"num_classes": "many"}, "num_classes='many'"),
        ({"encoder_depth": "two"}, "encoder_depth='two'"),
        ({"source": {"ema": tiny_state("off"), "args": {"cfg_prob": float("nan")}}}, "label dropout=nan"),
        ({"source": {"ema": tiny_state("off"), "args": {"cfg_prob": -1}}}, "label dropout=-1"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments, reason):
    given = {"source": tiny_state("off"), "family": "repa", "num_heads": 4, **arguments}
    with pytest.raises(CheckpointError, match=reason):
        load_official(**given)


@loop_over(
    ("change", "reason"),
    [
        (lambda state: {**state, 3: torch.zeros(1)}, "entry 3 is named by int"),
        (lambda state: {**state, "epoch": 3}, "'epoch' is int"),
        (lambda state: {**state, "a\x1b[31m\nb": torch.zeros(1)}, r"entry 'a\\x1b\[31m\\nb' is not named"),
        (lambda state: {**state, "pos_embed": state["pos_embed"].to("meta")}, "'pos_embed' is on the meta device"),
        (lambda state: {**state, "pos_embed": state["pos_embed"].to_sparse()}, "'pos_embed' is stored as"),
        (lambda state: {**state, "pos_embed": state["pos_embed"].to(torch.int8)}, "'pos_embed' is torch.int8"),
        (lambda state: {**state, "pos_embed": state["pos_embed"] / 0}, "'pos_embed' holds NaN or Inf"),
        (lambda state: {key.replace("s.2.", "s.99999999."): state[key] for key in state}, r"missing key 'blocks\.2\."),
    ],
)
def test_entries_that_are_no_weights_are_named(change, reason):
    with pytest.raises(CheckpointError, match=reason):
        load_official(change(tiny_state("off")), "repa", num_heads=4)


def test_weights_that_are_views_become_plain_tensors():
    state = tiny_state("off")
    name = "blocks.0.attn.proj.weight"
    model = load_official({**state, name: state[name].T.contiguous().T}, "repa", num_heads=4)
    assert model.get_parameter(name).is_contiguous()
    assert torch.equal(model.get_parameter(name), state[name])


def test_a_label_table_without_a_null_row(tmp_path):
    """Published codes make no such row when they train without label dropout: the table then has num_classes rows."""
    state = {key: value.float() for key, value in tiny_state("off").items()}
    rows = len(state["y_embedder.embedding_table.weight"])
    known = [
        load_official(state, "repa", num_heads=4, num_classes=rows),
        load_official({"ema": state, "args": argparse.Namespace(num_classes=rows)}, "repa", num_heads=4),
        load_official({"ema": state, "args": {"cfg_prob": 0.0}}, "repa", num_heads=4),
    ]
    save_official(known[0], tmp_path / "a.safetensors")
    known.append(load_official(tmp_path / "a.safetensors", "repa"))
    noise, y = torch.zeros(1, 4, 8, 8), torch.tensor([rows - 1])
    for model in known:
        assert (model.num_classes, model.null_label) == (rows, -1)
        sample(model, noise, y, num_steps=1)
        with pytest.raises(UserError, match="null_label"):
            sample(model, noise, y, num_steps=1, cfg_scale=0.0)
        with pytest.raises(UserError, match="no trained null label"):
            model.null(y)
        assert torch.equal(
            export_official(model)["y_embedder.embedding_table.weight"], state["y_embedder.embedding_table.weight"]
        )
    assert load_official({"ema": state, "args": {"num_classes": rows - 1}}, "repa", num_heads=4).null_label == rows - 1
    never = load_official({"ema": state, "args": {"num_classes": rows - 1, "cfg_prob": 0}}, "repa", num_heads=4)
    assert (never.num_classes, never.null_label) == (rows - 1, -1)
    for wrong in (0, rows - 2, rows + 1):
        with pytest.raises(CheckpointError, match=f"num_classes={wrong}, but .*pass num_classes={rows - 1} or {rows}"):
            load_official(state, "repa", num_heads=4, num_classes=wrong)
    with pytest.raises(CheckpointError, match="num_classes=7, but"):
        load_official({"ema": state, "args": {"num_classes": 7}}, "repa", num_heads=4)


def test_what_is_taken_for_granted_is_said(caplog):
    state = tiny_state("off")
    load_official(state, "repa", num_heads=1, num_classes=1000)
    assert not caplog.messages
    load_official(state, "repa")
    (line,) = caplog.messages
    assert "num_heads=1 (heads of width 64)" in line
    assert "num_classes=1000 (the last of 1001 labels is the null label)" in line
