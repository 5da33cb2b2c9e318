"""A save that is killed, refused by the disk or damaged later never costs the checkpoint before it."""

import errno
import json
import logging
import os
import shutil
import subprocess

import pytest
import torch

from dit_fast.checkpoint.step import newest_checkpoint, open_checkpoint
from dit_fast.errors import CheckpointError
from dit_fast.train import disk
from dit_fast.train.checkpoints import Checkpoints
from dit_fast.train.world import World

SHAPES = {"a.weight": (5, 3), "a.bias": (3,), "b": (), "empty": (0, 4)}
FROZEN = {"pos": torch.linspace(0, 1, 6).reshape(2, 3), "count": torch.arange(4)}
WORLD = World(0, 1, torch.device("cpu"))


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it, nothing is cleaned up."""


class Weights:
    """An engine as far as checkpoints are concerned; the values depend on the step."""

    def __init__(self, step):
        self.step = step

    def trainable(self):
        return [(name, torch.Size(shape)) for name, shape in SHAPES.items()]

    def full_state(self, kind):
        for number, (name, shape) in enumerate(SHAPES.items()):
            generator = torch.Generator().manual_seed(1000 * self.step + 10 * number + len(kind))
            yield name, torch.randn(shape, generator=generator)


def save(run, step, **options):
    return Checkpoints(run, WORLD, **options).save(Weights(step), FROZEN, {"step": step, "note": "x"})


def assert_is_step(checkpoint, step):
    assert checkpoint.step == step
    assert checkpoint.state["note"] == "x"
    for kind in ("model", "ema", "exp_avg", "exp_avg_sq"):
        source = checkpoint.source(kind)
        for name, value in Weights(step).full_state(kind):
            assert torch.equal(source(name), value)
    assert checkpoint.state_dict("model")["count"].dtype == torch.int64
    assert torch.equal(checkpoint.state_dict("ema")["pos"], FROZEN["pos"])


def test_round_trip_and_no_pickle(tmp_path):
    assert save(tmp_path, 7)
    checkpoint = Checkpoints(tmp_path, WORLD).newest()
    assert_is_step(checkpoint, 7)
    names = sorted(path.name for path in checkpoint.path.iterdir())
    assert names == [
        "MANIFEST.json", "ema.safetensors", "model.safetensors", "optim-00001-of-00001.safetensors", "state.json",
    ]  # fmt: skip
    assert (tmp_path / "checkpoints/LATEST").read_text() == "step_00000007\n"
    with pytest.raises(CheckpointError, match="no exp_avg of parameter 'nobody'"):
        checkpoint.source("exp_avg")("nobody")


def _count_operations(tmp_path, monkeypatch):
    calls = []
    with monkeypatch.context() as patch:
        for name in OPERATIONS:
            real = getattr(disk, name)
            patch.setattr(disk, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
        save(tmp_path / "count", 5)
    return len(calls)


OPERATIONS = ("write", "sync", "sync_folder", "rename", "write_synced", "replace", "remove_tree")


class Deaths:
    """Kills at operation number `victim`, before or after it is done."""

    def __init__(self, victim, moment):
        self.victim, self.moment, self.count = victim, moment, 0

    def wrap(self, real):
        def operation(*arguments):
            number, self.count = self.count, self.count + 1
            if (number, self.moment) == (self.victim, "before"):
                raise Killed
            result = real(*arguments)
            if number == self.victim:
                raise Killed
            return result

        return operation


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_every_write_flush_and_rename(tmp_path, monkeypatch, moment):
    total = _count_operations(tmp_path, monkeypatch)
    assert total > 20
    newest = []
    for victim in range(total):
        run = tmp_path / f"{victim}"
        save(run, 4)
        with monkeypatch.context() as patch:
            deaths = Deaths(victim, moment)
            for name in OPERATIONS:
                patch.setattr(disk, name, deaths.wrap(getattr(disk, name)))
            with pytest.raises(Killed):
                save(run, 8)
        again = Checkpoints(run, WORLD)
        checkpoint = again.newest()
        assert checkpoint.step in (4, 8)
        assert_is_step(checkpoint, checkpoint.step)
        assert not list(run.glob("checkpoints/*.partial"))
        newest.append(checkpoint.step)
        if checkpoint.step == 4:
            assert save(run, 8)
            assert_is_step(again.newest(), 8)
        shutil.rmtree(run)
    assert newest == sorted(newest)  # lost before the rename, there after it
    assert {4, 8} == set(newest)


def _damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    elif how == "truncate":
        data = data[: len(data) // 2]
    else:
        path.unlink()
        return
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
@pytest.mark.parametrize(
    "file", ["model.safetensors", "ema.safetensors", "optim-00001-of-00001.safetensors", "state.json", "MANIFEST.json"]
)
def test_a_damaged_checkpoint_is_passed_over_with_a_message(tmp_path, caplog, file, how):
    save(tmp_path, 4)
    save(tmp_path, 8)
    broken = tmp_path / "checkpoints/step_00000008"
    if (file, how) == ("MANIFEST.json", "flip"):
        manifest = json.loads((broken / file).read_text())
        manifest["files"]["state.json"]["sha256"] = "0" * 64
        (broken / file).write_text(json.dumps(manifest))
    else:
        _damage(broken / file, how)
    with caplog.at_level(logging.WARNING, "dit_fast"):
        assert_is_step(Checkpoints(tmp_path, WORLD).newest(), 4)
    assert "step_00000008" in caplog.text
    assert "going back to step 4" in caplog.text
    assert (tmp_path / "checkpoints/step_00000008.damaged").is_dir()
    assert save(tmp_path, 8)
    assert_is_step(Checkpoints(tmp_path, WORLD).newest(), 8)


def test_never_starts_over_in_silence(tmp_path):
    save(tmp_path, 4)
    _damage(tmp_path / "checkpoints/step_00000004/ema.safetensors", "flip")
    with pytest.raises(ValueError, match=r"ema\.safetensors.*sha256.*step 0"):
        Checkpoints(tmp_path, WORLD).newest()
    assert (tmp_path / "checkpoints/step_00000004").is_dir()


def test_size_alone_is_checked_where_hashes_are_not_wanted(tmp_path):
    save(tmp_path, 4)
    _damage(tmp_path / "checkpoints/step_00000004/ema.safetensors", "flip")
    assert newest_checkpoint(tmp_path, hashes=False)[0].step == 4
    assert newest_checkpoint(tmp_path)[0] is None


def test_another_format_is_refused(tmp_path):
    save(tmp_path, 4)
    manifest = tmp_path / "checkpoints/step_00000004/MANIFEST.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(CheckpointError, match="version 2; this dit_fast reads"):
        open_checkpoint(manifest.parent)


@pytest.mark.parametrize("operation", ["write", "sync", "write_synced", "rename"])
def test_a_full_disk_leaves_a_warning_and_no_debris(tmp_path, monkeypatch, caplog, operation):
    save(tmp_path, 4)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(disk, operation, full)
        assert not save(tmp_path, 8)
    assert "checkpoint step_00000008 not written" in caplog.text
    assert "No space left on device" in caplog.text
    assert not list(tmp_path.glob("checkpoints/*.partial"))
    assert_is_step(Checkpoints(tmp_path, WORLD).newest(), 4)
    assert save(tmp_path, 12)
    assert_is_step(Checkpoints(tmp_path, WORLD).newest(), 12)


def test_free_space_is_looked_at_first(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    monkeypatch.setattr(disk, "write", pytest.fail)
    assert not save(tmp_path, 8)
    assert "needs 1 MiB and the disk has 0 MiB left" in caplog.text


def test_retention_keeps_the_newest_and_the_marked(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep=2, keep_every=3)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir())
    assert kept == ["step_00000003", "step_00000006", "step_00000007"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_really_full_disk(tmp_path, monkeypatch, caplog):
    """The same on a tmpfs of one MiB, with the look at free space switched off."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        save_free = disk.free_bytes
        assert save_free(small) <= 1 << 20
        monkeypatch.setattr(disk, "free_bytes", lambda path: 1 << 40)
        assert save(small, 4)
        (small / "ballast").write_bytes(b"x" * (save_free(small) - 8192))
        assert not save(small, 8)
        assert "No space left on device" in caplog.text
        assert not list(small.glob("checkpoints/*.partial"))
        (small / "ballast").unlink()
        assert_is_step(Checkpoints(small, WORLD).newest(), 4)
        assert save(small, 12)
    finally:
        subprocess.run(["umount", small], check=True)
