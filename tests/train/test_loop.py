"""Whole runs in this process: resume, refusals, stop, previews, the journal, and reading the run back."""

import json
import os
import re
import shutil
import signal
import socket

import numpy as np
import pytest
import torch
from toy_runs import arguments, losses, make_shards, rows, tensors

from dit_fast.checkpoint.run import load_run
from dit_fast.errors import CheckpointError
from dit_fast.train import disk, lock, loop
from dit_fast.train.__main__ import main


def fails(capsys, *command):
    """The one line that a wrong command prints."""
    assert main(list(command)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dit-fast: error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """An uninterrupted run of 12 steps."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(arguments(shards, run)) == 0
    return run


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def same_tensors(first, second, step=12):
    a, b = tensors(first, step), tensors(second, step)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_what_it_promises(finished):
    log = rows(finished)
    assert [row["step"] for row in log] == list(range(1, 13))
    assert log[-1]["samples"] == 96
    assert {"loss", "flow", "diversedit/total", "diversedit/weight", "grad_norm", "lr"} <= log[0].keys()
    assert [row["lr"] for row in log[:4]] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])
    config = json.loads((finished / "config.json").read_text())
    assert (config["model"]["input_size"], config["model"]["num_classes"]) == (4, 3)
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "LATEST", "step_00000004", "step_00000008", "step_00000012",
    ]  # fmt: skip
    assert (finished / "lock.json").read_text() == ""


def test_ema_is_what_the_weights_say(finished):
    """The EMA at step 12 lies between the weights of 8 and 12 and differs from both."""
    state = tensors(finished, 12)
    name = "final_layer.linear.weight"
    distance = (state[f"ema/{name}"] - state[f"model/{name}"]).norm()
    moved = (tensors(finished, 8)[f"model/{name}"] - state[f"model/{name}"]).norm()
    assert 0 < distance < 2 * moved
    assert torch.equal(state["ema/pos_embed"], state["model/pos_embed"])


@pytest.mark.parametrize("step", [4, 8])
def test_resume_is_exact(finished, copied, step):
    """Everything after `step` is lost; the same command gives the same rows, weights, EMA and moments, bit for bit."""
    for later in range(step + 4, 13, 4):
        shutil.rmtree(copied / "checkpoints" / f"step_{later:08d}")
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "los')  # a row cut short by a kill
    assert main(saved_command(copied)) == 0
    assert rows(copied) == rows(finished)
    assert same_tensors(copied, finished)


def saved_command(run, *overrides):
    """A run described by its own config.json, as a user would restart it."""
    return [str(run / "config.json"), f"run.dir={run}", *overrides]


def test_extending_a_run_and_finding_it_done(copied, caplog):
    assert main(saved_command(copied, "run.steps=14")) == 0
    assert [row["step"] for row in rows(copied)] == list(range(1, 15))
    before = (copied / "metrics.jsonl").read_bytes()
    with caplog.at_level("INFO", "dit_fast"):
        assert main(saved_command(copied, "run.steps=14")) == 0
    assert "nothing left to do" in caplog.text
    assert (copied / "metrics.jsonl").read_bytes() == before


def test_a_changed_configuration_is_refused_with_the_difference(copied, capsys):
    message = fails(capsys, *saved_command(copied, "run.steps=14", "optimizer.lr=2e-3", "methods=none"))
    assert "optimizer.lr: 0.001 -> 0.002" in message
    assert "methods.diversedit.pairs" in message
    assert "run.steps" not in message
    assert [row["step"] for row in rows(copied)] == list(range(1, 13))


def test_what_may_change_may_change(copied):
    changes = ["run.steps=13", "run.log_every=2", "run.keep_checkpoints=1", "engine.zero_stage=3", "data.num_workers=1"]
    assert main(saved_command(copied, *changes, "optimizer.name=torch_adamw", "engine.micro_batch=4")) == 0
    assert [path.name for path in (copied / "checkpoints").glob("step_*")] == ["step_00000013"]


def test_another_data_set_is_refused(copied, capsys, tmp_path):
    other = make_shards(tmp_path, count=50, seed=1)
    message = fails(capsys, *saved_command(copied, "run.steps=14", f"data.path={other}"))
    assert "another data set (fingerprint" in message


def test_two_writers_are_refused(copied, capsys, monkeypatch):
    monkeypatch.setattr(lock, "LEAVING", 0)
    held = lock.RunLock(copied)
    message = fails(capsys, *saved_command(copied, "run.steps=14"))
    assert f"process {os.getpid()} on {socket.gethostname()} is writing to this run folder" in message
    assert (copied / "lock.json").read_text()  # the holder's record is left alone
    held.release()
    assert main(saved_command(copied, "run.steps=13")) == 0


def test_stop_file_and_signal_save_and_leave(shards, tmp_path, finished, monkeypatch):
    run, real = tmp_path / "run", loop.learning_rate

    def at_step(config, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == 9:
            (run / "STOP").touch()
        return real(config, step)

    monkeypatch.setattr(loop, "learning_rate", at_step)
    handler = signal.getsignal(signal.SIGTERM)
    assert main(arguments(shards, run)) == 0
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (run / "checkpoints/step_00000007").is_dir()  # asked during step 6, agreed one step later
    assert main(arguments(shards, run)) == 0
    assert (run / "checkpoints/step_00000011").is_dir()
    assert not (run / "STOP").exists()
    assert main(arguments(shards, run)) == 0
    assert rows(run) == rows(finished)
    assert same_tensors(run, finished)


def test_without_checkpoint_space_the_run_goes_on_and_says_so_at_its_end(shards, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda path: 0)
    message = fails(capsys, *arguments(shards, tmp_path / "run"))
    assert "no checkpoint of step 12 could be written" in message
    assert caplog.text.count("not written: needs") == 3
    assert len(losses(tmp_path / "run")) == 12


def test_a_nan_is_skipped_and_twenty_stop_the_run(shards, tmp_path, capsys, monkeypatch):
    real = loop._Run._next

    def poisoned(self, batches):
        found = real(self, batches)
        if found[0]["position"][0] >= 8 * 5:
            found[0]["moments"].fill_(float("nan"))
        return found

    monkeypatch.setattr(loop._Run, "_next", poisoned)
    run = tmp_path / "run"
    message = fails(capsys, *arguments(shards, run, "run.steps=40"))
    assert "no finite gradient in steps 6 to 25" in message
    assert "newest checkpoint is step 24" in message
    assert all(torch.isfinite(tensor).all() for tensor in tensors(run, 24).values())
    assert rows(run)[5]["skipped"] == 1
    assert "loss" not in rows(run)[5]


def test_previews_come_from_the_averaged_weights(shards, tmp_path):
    from PIL import Image

    extra = ["preview.every=4", "preview.count=5", "preview.num_steps=3", "run.steps=4"]
    assert main(arguments(shards, tmp_path / "a", *extra)) == 0
    assert main(arguments(shards, tmp_path / "b", *extra, "run.checkpoint_every=2")) == 0
    first, second = (np.asarray(Image.open(tmp_path / run / "samples/step_00000004.png")) for run in "ab")
    assert first.shape == (2 * 64, 3 * 64, 3)
    assert (first == second).all()
    assert (first[64:, 128:] == 255).all()  # the sixth place is empty
    assert first[:64, :64].std() > 1


def test_load_run_gives_model_configuration_and_state(finished):
    model, config, state = loaded = load_run(finished)
    stored = tensors(finished, 12)
    assert loaded.step == state["step"] == 12
    assert config.model.num_classes == 3
    assert not model.training
    assert torch.equal(model.final_layer.linear.weight, stored["ema/final_layer.linear.weight"])
    raw = load_run(finished / "checkpoints/step_00000008", weights="model")
    assert torch.equal(raw.model.pos_embed, stored["model/pos_embed"])
    assert raw.step == 8


def test_load_run_says_what_is_wrong(tmp_path, copied):
    with pytest.raises(CheckpointError, match="holds no checkpoint; give the folder of a run"):
        load_run(tmp_path)
    broken = copied / "checkpoints/step_00000012/ema.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    assert load_run(copied).step == 8
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: has"):
        load_run(copied / "checkpoints/step_00000012")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.dir="], "run.dir is not set"),
        (["data.path="], "data.path is not set"),
        (["data.path=/nowhere"], "/nowhere: no such folder"),
        (["model.input_size=32"], "model.input_size=32, but the latents of .* have 4"),
        (["model.num_classes=2"], "labels of .* go up to 2; use model.num_classes=3"),
        (["engine.micro_batch=3"], "engine.micro_batch=3 does not divide the 8 samples of each rank.*micro_batch=2"),
        (["run.log_every=0"], r"run.log_every=0 must lie in \[1, 1e9\]"),
        (["optimizer.ema_decay=1"], r"must lie in \[0, 1\)"),
        (["methods=repa", "methods.repa.encoder_depth=2"], "has no field 'features'"),
        (["model.attention=flash"], "flash.* is not installed"),
        (["optimizer.name=apex_fused_adam"], "CUDA devices only"),
        (["optimizer.lrr=1"], "optimizer.lr'"),
        (["methods.diversedit.pairs=release", "methods.diversedit.encoder_depth=11"], "encoder_depth=11"),
    ],
)
def test_wrong_commands_are_one_line(shards, tmp_path, capsys, overrides, message):
    line = fails(capsys, *arguments(shards, tmp_path / "run", *overrides))
    assert re.search(message, line), line


def test_ranks_that_do_not_divide_the_batch_are_named():
    from dit_fast.config import EngineConfig
    from dit_fast.errors import ConfigError
    from dit_fast.train.prepare import micro_batch

    with pytest.raises(ConfigError, match=r"global_batch=96 does not divide over 5 ranks; use a multiple of 5 \(95\)"):
        micro_batch(EngineConfig(global_batch=96), 5)
    assert micro_batch(EngineConfig(global_batch=96), 4) == 24


def test_print_config_trains_nothing(shards, tmp_path, capsys):
    assert main([*arguments(shards, tmp_path / "run", "optimizer.lr=5e-4"), "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["optimizer"]["lr"] == 5e-4
    assert not (tmp_path / "run").exists()


def test_corrupt_data_stops_with_the_member_named(tmp_path, capsys):
    broken = make_shards(tmp_path)
    tar = sorted(broken.glob("*.tar"))[1]
    data = bytearray(tar.read_bytes())
    data[1024 + 200] ^= 255
    tar.write_bytes(data)
    message = fails(capsys, *arguments(broken, tmp_path / "run"))
    assert tar.name in message
    assert "rank 0" in message
