"""Whole runs in this process: resume, refusals, stop, previews, the journal, and reading the run back."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import socket

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_fast import files
from dit_fast.checkpoint.run import load_run
from dit_fast.errors import CheckpointError, DataError, Status
from dit_fast.train import feed, lock, loop
from dit_fast.train.__main__ import main
from dit_fast.train.engine import SingleEngine
from dit_fast.train.feed import Feed
from tests.helpers.toy_runs import arguments, losses, make_shards, rows, tensors


def fails(capsys, *command, status=2):
    """The one line that a wrong command prints."""
    assert main(list(command)) == status
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
        "step_00000004",
        "step_00000008",
        "step_00000012",
    ]
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
            os.kill(os.getpid(), signal.SIGUSR1)
        if step == 9:
            (run / "STOP").touch()
        return real(config, step)

    monkeypatch.setattr(loop, "learning_rate", at_step)
    handler = signal.getsignal(signal.SIGUSR1)
    assert main(arguments(shards, run)) == Status.RESTART  # a scheduler's notice, and steps are left
    assert signal.getsignal(signal.SIGUSR1) is handler
    assert (run / "checkpoints/step_00000007").is_dir()  # asked during step 6, agreed one step later
    assert main(arguments(shards, run)) == 0
    assert (run / "checkpoints/step_00000011").is_dir()
    assert not (run / "STOP").exists()
    assert main(arguments(shards, run)) == 0
    assert rows(run) == rows(finished)
    assert same_tensors(run, finished)


def test_without_checkpoint_space_the_run_goes_on_and_says_so_at_its_end(shards, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 0)
    message = fails(capsys, *arguments(shards, tmp_path / "run"))
    assert "no checkpoint of step 12 could be written" in message
    assert caplog.text.count("not written: needs") == 3
    assert len(losses(tmp_path / "run")) == 12


def test_a_nan_is_skipped_and_twenty_stop_the_run(shards, tmp_path, capsys, monkeypatch):
    poison(monkeypatch, range(5, 40))
    run = tmp_path / "run"
    for _ in range(2):  # a restart goes on from a checkpoint inside the streak, and with the streak
        options = ["run.steps=40", "run.keep_checkpoints=2", "run.max_rollbacks=0"]
        message = fails(capsys, *arguments(shards, run, *options), status=3)
        assert "no finite gradient in steps 6 to 25" in message
        assert "newest checkpoint is step 24" in message
    assert all(torch.isfinite(tensor).all() for tensor in tensors(run, 24).values())
    assert (run / "checkpoints/step_00000004").is_dir()  # nothing from before the streak goes for what is inside it
    assert rows(run)[5]["skipped"] == 1
    assert "loss" not in rows(run)[5]


def poison(monkeypatch, steps):
    """NaN in the data of these steps (from 0)."""
    real = Feed.take

    def take(self):
        found = real(self)
        if int(found[0]["position"][0]) // 8 in steps:
            found[0]["moments"].fill_(float("nan"))
        return found

    monkeypatch.setattr(Feed, "take", take)


def test_skipped_steps_are_named_and_a_last_one_is_no_success(shards, tmp_path, capsys, caplog, monkeypatch):
    run = tmp_path / "run"
    poison(monkeypatch, [2, 5, 7])
    message = fails(capsys, *arguments(shards, run, "run.steps=8", "run.log_every=4"), status=3)
    assert "the last step, 8, had no finite gradient and was skipped; 3 of 8 steps" in message
    assert "newest checkpoint is step 8" in message
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "1 of the last 4 steps had no finite gradient and were skipped: step 3 (positions 16 to 23)",
        "3 of the last 8 steps had no finite gradient and were skipped: step 6 (positions 40 to 47), "
        "step 8 (positions 56 to 63)",
    ]
    assert json.loads((run / "checkpoints/step_00000008/state.json").read_text())["skipped_steps"] == [3, 6, 8]
    assert "the last step, 8" in fails(capsys, *arguments(shards, run, "run.steps=8"), status=3)  # nor later
    caplog.clear()
    assert main(arguments(shards, run, "run.steps=10")) == 0
    assert "3 of 10 steps had no finite gradient and were skipped, lately step 3" in caplog.text


@pytest.mark.parametrize(
    ("kind", "value"), [("model", "inf"), ("model", "nan"), ("ema", "inf"), ("exp_avg", "nan"), ("exp_avg_sq", "-inf")]
)
def test_what_is_not_finite_is_never_saved_or_drawn(finished, copied, capsys, monkeypatch, kind, value):
    real, name = SingleEngine.train_step, "final_layer.linear.weight"

    def train_step(self, batches, step, lr):
        result = real(self, batches, step, lr)
        if step == 13:
            dict(self.full_state(kind))[name].view(-1)[3] = float(value)
        return result

    monkeypatch.setattr(SingleEngine, "train_step", train_step)
    options = ["run.steps=16", "run.checkpoint_every=1", "run.keep_checkpoints=2", "run.max_rollbacks=0"]
    options += ["preview.every=1"]
    message = fails(capsys, *saved_command(copied, *options, "preview.count=1", "preview.num_steps=1"), status=3)
    assert f"{kind} of '{name}' is not finite after step 14, so no checkpoint was written" in message
    assert "the newest checkpoint is step 13" in message
    kept = sorted(path.name for path in (copied / "checkpoints").glob("step_*"))
    assert kept == ["step_00000012", "step_00000013"]
    assert (copied / "samples/step_00000014.png").exists() == (kind != "ema")


def test_an_update_that_breaks_the_weights_ends_the_run(shards, tmp_path, capsys, monkeypatch):
    """Finite gradients, but an update that is not; the last step is the first to be saved."""
    monkeypatch.setattr(loop, "learning_rate", lambda config, step: math.inf)
    options = ["run.checkpoint_every=0", "run.steps=1"]
    message = fails(capsys, *arguments(shards, tmp_path / "run", *options), status=3)
    assert re.search("model of '.*' is not finite after step 1", message)
    assert "there is no checkpoint yet" in message
    assert not list((tmp_path / "run/checkpoints").glob("step_*"))


def test_a_preview_of_broken_averages_is_not_drawn(shards, tmp_path, capsys, monkeypatch):
    real = SingleEngine.train_step

    def train_step(self, batches, step, lr):
        result = real(self, batches, step, lr)
        next(self.full_state("ema"))[1].fill_(float("inf"))
        return result

    monkeypatch.setattr(SingleEngine, "train_step", train_step)
    message = fails(capsys, *arguments(shards, tmp_path / "run", "preview.every=1"), status=3)
    assert re.search("ema of '.*' is not finite after step 1, so no preview was drawn; there is no check", message)


def test_checkpoints_that_an_older_version_saved_with_nan_are_passed_over(copied, caplog):
    for kind in ("model", "ema"):
        path = copied / "checkpoints/step_00000012" / f"{kind}.safetensors"
        found = load_file(path)
        found["pos_embed"][0, 0, 0] = float("nan")
        reseal(path, lambda path=path, found=found: save_file(found, path))
    assert main(saved_command(copied)) == 0
    assert "model of 'pos_embed' is not finite; going back to step 8" in caplog.text


def reseal(path, change):
    """Changes a file of a checkpoint and makes the manifest right again, without a digest, as older versions did."""
    change()
    manifest = path.with_name("MANIFEST.json")
    content = json.loads(manifest.read_text())
    data = path.read_bytes()
    content["files"][path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content.pop("digest", None)
    manifest.write_text(json.dumps(content))


def test_older_checkpoints_resume(copied, finished):
    """Without a digest in the manifest, the guard's memory in the state, and keys that the configuration got later."""
    shutil.rmtree(copied / "checkpoints/step_00000012")
    path = copied / "checkpoints/step_00000008/state.json"
    state = json.loads(path.read_text())
    del state["skipped_steps"], state["config"]["objective"]["name"], state["config"]["objective"]["time_std"]
    state["config"]["flow"] = state["config"].pop("objective")
    reseal(path, lambda: path.write_text(json.dumps(state)))
    assert main(saved_command(copied)) == 0
    assert same_tensors(copied, finished)


def test_tensors_of_another_model_are_refused_before_anything_is_loaded(copied, capsys):
    path = copied / "checkpoints/step_00000012/optim-00001-of-00001.safetensors"
    found = load_file(path)
    name = "exp_avg.final_layer.linear.bias"
    found[name] = found[name][:1].clone()  # this would be broadcast
    reseal(path, lambda: save_file(found, path))
    message = fails(capsys, *saved_command(copied, "run.steps=13"))
    assert "exp_avg of 'final_layer.linear.bias' is F32 [1], the model's is F32 [48]; was it made by ano" in message


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
    with pytest.raises(CheckpointError, match="holds checkpoints, and is no run itself; give one of them, or the run"):
        load_run(copied / "checkpoints")
    with pytest.raises(CheckpointError, match="holds no checkpoint; give the folder of a run"):
        load_run(copied / "previews")
    with pytest.raises(CheckpointError, match=f"is no run itself; name one of those in it: {copied}$"):
        load_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json: cannot be read \(File name too long\)"):
        load_run(tmp_path / ("a" * 300))
    broken = copied / "checkpoints/step_00000012/ema.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    assert load_run(copied).step == 8
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: has"):
        load_run(copied / "checkpoints/step_00000012")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.dir="], "run.dir is not set"),
        (["run.dir=r\udcff"], "the name is not UTF-8"),
        (["data.path="], "data.path is not set"),
        (
            ["model.residual_dtype=bf16"],
            "residual_dtype=bf16 says what the stream is under engine.precision=bf16; set that",
        ),
        (["data.path=/nowhere"], "/nowhere: no such folder"),
        (["model.input_size=32"], "model.input_size=32, but the latents of .* have 4"),
        (["model.input_width=32"], "model.input_width=32, but the latents of .* have 4"),
        (["model.num_classes=2"], "labels of .* go up to 2; use model.num_classes=3"),
        (["engine.micro_batch=3"], "engine.micro_batch=3 does not divide the 8 samples of each rank.*micro_batch=2"),
        (["methods=repa", "methods.repa.encoder_depth=2"], "no field 'features' in the shards"),
        (["model.attention=flash"], "flash.* is not installed"),
        (["optimizer.name=apex_fused_adam"], "CUDA devices only"),
        (["methods.diversedit.pairs=release", "methods.diversedit.encoder_depth=11"], "encoder_depth=11"),
    ],
)
def test_wrong_commands_are_one_line(shards, tmp_path, capsys, overrides, message):
    line = fails(capsys, *arguments(shards, tmp_path / "run", *overrides))
    assert re.search(message, line), line


def test_ranks_that_do_not_divide_the_batch_are_named():
    from dit_fast.errors import ConfigError
    from dit_fast.runs import EngineConfig
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
    message = fails(capsys, *arguments(broken, tmp_path / "run", "run.checkpoint_every=0", "data.strict=true"))
    assert tar.name in message
    assert "rank 0" in message
    (saved,) = (tmp_path / "run/checkpoints").glob("step_*")
    assert len(rows(tmp_path / "run")) == int(saved.name[5:])  # not a step is lost


@pytest.mark.parametrize(
    ("first", "error"), [(0, DataError("no luck")), (1, DataError("no luck")), (3, RuntimeError("bug"))]
)
def test_data_that_ends_early_loses_no_step(shards, tmp_path, capsys, monkeypatch, first, error):
    """The first step (from 0) without data: all before it are saved, then the error is told."""
    real = feed.build_loader

    def ending(*arguments, **options):
        for number, batch in enumerate(real(*arguments, **options)):
            if number == 4 * first + 2:
                raise error
            yield batch

    monkeypatch.setattr(feed, "build_loader", ending)
    command = arguments(shards, tmp_path / "run", "run.checkpoint_every=0", "run.steps=5")
    if isinstance(error, DataError):
        assert "rank 0: no luck" in fails(capsys, *command)
    else:  # a fault of the program is told as one
        assert "RuntimeError: bug (unexpected" in fails(capsys, *command, status=1)
    saved = [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")]
    assert saved == ([f"step_{first:08d}"] if first else [])


def test_interrupt_saves_and_a_second_one_does_not(shards, tmp_path, monkeypatch, capsys):
    run, real = tmp_path / "run", loop.learning_rate
    times = {5: 1, 8: 2}

    def at_step(config, step):
        for _ in range(times.get(step, 0)):
            os.kill(os.getpid(), signal.SIGINT)
        return real(config, step)

    monkeypatch.setattr(loop, "learning_rate", at_step)
    assert main(arguments(shards, run, "run.checkpoint_every=0")) == 0
    assert (run / "checkpoints/step_00000007").is_dir()
    assert main(arguments(shards, run, "run.checkpoint_every=0")) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000007"]


@pytest.mark.parametrize("when", ["last step", "after the end"])
def test_a_stop_file_does_not_outlive_the_run_it_was_for(shards, tmp_path, monkeypatch, when):
    run, real = tmp_path / "run", loop.learning_rate

    def at_step(config, step):
        if step == 3:
            (run / "STOP").touch()
        return real(config, step)

    if when == "last step":
        monkeypatch.setattr(loop, "learning_rate", at_step)
    assert main(arguments(shards, run, "run.steps=4")) == 0
    if when == "after the end":
        (run / "STOP").touch()
        assert main(arguments(shards, run, "run.steps=4")) == 0
    assert not (run / "STOP").exists()


def test_a_preview_lost_to_a_kill_is_drawn_at_the_next_start(shards, tmp_path):
    run = tmp_path / "run"
    options = ["preview.every=4", "preview.count=1", "preview.num_steps=1", "run.steps=6"]
    assert main(arguments(shards, run, *options)) == 0
    samples = {path: path.read_bytes() for path in (run / "samples").iterdir()}
    assert [path.name for path in sorted(samples)] == ["step_00000004.png", "step_00000006.png"]
    shutil.copytree(run, tmp_path / "earlier")
    shutil.rmtree(tmp_path / "earlier/checkpoints/step_00000006")
    for folder in (run, tmp_path / "earlier"):  # killed before the last one, and before the one in the middle
        shutil.rmtree(folder / "samples")
        assert main(arguments(shards, folder, *options)) == 0
    assert (run / "samples/step_00000006.png").read_bytes() == samples[run / "samples/step_00000006.png"]
    assert all((tmp_path / "earlier/samples" / path.name).read_bytes() == data for path, data in samples.items())


def test_leftovers_of_a_kill_go_at_the_next_start(copied):
    left = ["config.json.partial", "metrics.jsonl.partial", "samples/step_00000003.png.partial"]
    (copied / "samples").mkdir()
    (copied / "checkpoints/step_00000016.partial").mkdir()
    for name in left:
        (copied / name).write_text("half")
    (copied / "mine.partial").write_text("the user's own")
    assert main(saved_command(copied)) == 0
    assert not [name for name in (*left, "checkpoints/step_00000016.partial") if (copied / name).exists()]
    assert (copied / "mine.partial").exists()
