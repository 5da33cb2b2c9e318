"""A save that is killed, refused by the disk or damaged later never costs the checkpoint before it."""

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from dit_fast import files
from dit_fast.checkpoint.manifest import write_manifest
from dit_fast.checkpoint.step import KINDS, newest_checkpoint, open_checkpoint, step_folders
from dit_fast.errors import CheckpointError, UserError
from dit_fast.train.checkpoints import Checkpoints
from dit_fast.train.guard import Diverged
from dit_fast.train.part import HostMemory
from dit_fast.train.prepare import check_fits
from dit_fast.world import World
from tests.helpers.damage import flip

SHAPES = {"a.weight": (5, 3), "a.bias": (3,), "b": (), "empty": (0, 4)}
FROZEN = {"pos": torch.linspace(0, 1, 6).reshape(2, 3), "count": torch.arange(4)}
UNTRAINED = {"model": FROZEN, "ema": FROZEN, "rest": {"a.bias": torch.full((3,), 0.5)}}
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

    def own_state(self, kind):
        for name, tensor in self.full_state(kind):
            yield name, 0, tensor.flatten(), tensor.flatten()


def save(run, step, **options):
    checkpoints = Checkpoints(run, WORLD, **options)
    checkpoints.save(Weights(step), UNTRAINED, {"step": step, "note": "x"})
    return checkpoints.settle()


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
        "MANIFEST.json", "ema.safetensors", "model.safetensors", "optim-00001-of-00001.safetensors", "rest.safetensors",
        "state.json",
    ]  # fmt: skip
    assert torch.equal(checkpoint.source("rest")("a.bias"), UNTRAINED["rest"]["a.bias"])
    with pytest.raises(CheckpointError, match="no exp_avg of parameter 'nobody'"):
        checkpoint.source("exp_avg")("nobody")


OPERATIONS = ("write", "sync", "sync_folder", "rename", "write_synced", "remove_tree")


class Deaths:
    """Counts the operations of a save, and kills at number `victim`, before or after it is done."""

    def __init__(self, victim=None, moment=None):
        self.victim, self.moment, self.count = victim, moment, 0

    def save(self, run, step, monkeypatch):
        with monkeypatch.context() as patch:
            for name in OPERATIONS:
                patch.setattr(files, name, self.wrap(getattr(files, name)))
            save(run, step)

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
    calm, newest = Deaths(), []
    calm.save(tmp_path / "count", 5, monkeypatch)
    assert calm.count > 20
    for victim in range(calm.count):
        run = tmp_path / f"{victim}"
        save(run, 4)
        with pytest.raises(Killed):
            Deaths(victim, moment).save(run, 8, monkeypatch)
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
    middle = path.stat().st_size // 2
    if how == "flip":
        flip(path, 8 * middle)
    elif how == "truncate":
        os.truncate(path, middle)
    else:
        path.unlink()


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


def assert_passed_over(run, caplog, reason=""):
    """The newest of two checkpoints is: with a line that says why, and without a traceback."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dit_fast"):
        assert_is_step(Checkpoints(run, WORLD).newest(), 4)
    (line,) = caplog.messages
    assert "going back to step 4" in line
    assert reason in line
    assert "\n" not in line


def reseal(folder, file="state.json", **changes):
    """Changes JSON files with hashes that are right again; without a digest, as older versions wrote."""
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    if file == "state.json":
        data = json.dumps({**json.loads((folder / file).read_text()), **changes}).encode()
        (folder / file).write_bytes(data)
        manifest["files"][file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    else:
        manifest |= changes
    manifest.pop("digest", None)
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))


@pytest.fixture
def two(tmp_path):
    save(tmp_path, 4)
    save(tmp_path, 8)
    return tmp_path


def test_every_flipped_bit_of_a_manifest_is_found(two, caplog):
    manifest = two / "checkpoints/step_00000008/MANIFEST.json"
    sound = manifest.read_bytes()
    content = json.loads(sound)
    for bit in range(0, 8 * len(sound), 11):
        flip(manifest, bit)
        try:
            same = json.loads(manifest.read_bytes()) == content  # white space
        except ValueError:
            same = False
        found, complaints = newest_checkpoint(two, kinds=())
        assert (found.step, len(complaints)) == ((8, 0) if same else (4, 1)), bit
        flip(manifest, bit)


def test_the_step_is_said_in_three_places(two, caplog):
    folder = two / "checkpoints/step_00000008"
    for name in ("step_00000008", "step_00000072"):
        shutil.copytree(folder, two / "aside", dirs_exist_ok=True)
        folder.rename(two / "checkpoints" / name)
        if name == "step_00000008":
            reseal(folder, "MANIFEST.json", step=72)
        assert_passed_over(two, caplog, "72")
        shutil.rmtree(two / "checkpoints" / f"{name}.damaged")
        (two / "aside").rename(folder)
    reseal(folder, step=12)
    assert_passed_over(two, caplog, "state.json says step 12")
    (two / "checkpoints/step_00000008.damaged").rename(two / "copy")
    reseal(two / "copy", step=8)
    assert open_checkpoint(two / "copy").step == 8  # under any other name


@pytest.mark.parametrize("value", [None, [], True, -1, 1e999, "8", {}, 10**400, [[]]])
def test_wrong_values_anywhere_are_passed_over(two, caplog, value):
    folder = two / "checkpoints/step_00000008"
    sound = {file: (folder / file).read_bytes() for file in ("MANIFEST.json", "state.json")}
    files = json.loads(sound["MANIFEST.json"])["files"]
    entry = "model.safetensors"
    cases = [("MANIFEST.json", {field: value}) for field in ("step", "files", "format", "version", "unknown")]
    cases += [("MANIFEST.json", {"files": {**files, entry: {**files[entry], k: value}}}) for k in ("bytes", "sha256")]
    cases += [("MANIFEST.json", {"files": {**files, entry: value}})]
    cases += [("state.json", {field: value}) for field in ("step", "optimizer_step", "config", "dataset_fingerprint")]
    cases += [("state.json", {"skipped_steps": [value]}), ("state.json", {"skipped_steps": [8], "optimizer_step": 8})]
    for file, change in cases:
        if change in ({"config": {}}, {"dataset_fingerprint": "8"}, {"version": True}):
            continue
        reseal(folder, file, **change)
        found, complaints = newest_checkpoint(two)
        assert (found.step, len(complaints)) == (4, 1), change
        assert "\n" not in str(complaints[0])
        for name, content in sound.items():
            (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "a\0b", "more.safetensors", "optim-1-of-1"])
def test_a_manifest_names_its_own_files_only(two, caplog, name):
    folder = two / "checkpoints/step_00000008"
    files = json.loads((folder / "MANIFEST.json").read_text())["files"]
    reseal(folder, "MANIFEST.json", files={**files, name: files["state.json"]})
    assert_passed_over(two, caplog, "damaged (the files it names are")


def test_the_right_hash_of_something_else_is_passed_over(two, caplog):
    folder = two / "checkpoints/step_00000008"
    files = json.loads((folder / "MANIFEST.json").read_text())["files"]
    sound = shutil.copytree(folder, two / "sound")
    for file in ("model.safetensors", "optim-00001-of-00001.safetensors"):
        for data in (b"", b"x" * 100, (1 << 60).to_bytes(8, "little") + b"{}", b"\2" + bytes(7) + b"[]"):
            (folder / file).write_bytes(data)
            entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            (folder / "MANIFEST.json").write_bytes(write_manifest(8, {**files, file: entry}))
            found, (complaint,) = newest_checkpoint(two)
            assert found.step == 4
            assert f"{file}: cannot be read as safetensors" in str(complaint)
        shutil.copy(sound / file, folder / file)


@pytest.mark.parametrize("file", ["MANIFEST.json", "state.json", "ema.safetensors"])
def test_a_file_the_disk_does_not_give_back_is_passed_over(two, caplog, monkeypatch, file):
    real, number = Path.open, errno.EIO

    def refuse(self, *arguments, **options):
        if self.name == file and self.parent.name == "step_00000008":
            raise OSError(number, os.strerror(number))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert_passed_over(two, caplog, f"{file}: cannot be read (Input/output error)")


@pytest.mark.parametrize("make", [os.mkfifo, Path.touch, lambda path: path.symlink_to("/nowhere")])
@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json", "ema.safetensors", ""])
def test_what_is_no_file_or_folder_is_passed_over(two, caplog, make, name):
    """Without waiting for somebody who writes into a pipe; an older thing set aside or left half-written may be odd."""
    folder = two / "checkpoints/step_00000008"
    files.remove_tree(folder / name)
    make(folder / name)
    for suffix in (".damaged", ".partial"):
        make(folder.with_suffix(suffix))
    assert_passed_over(two, caplog, "step_00000008")
    assert save(two, 8)
    assert_is_step(Checkpoints(two, WORLD).newest(), 8)


def test_a_folder_that_takes_no_checkpoint_is_refused_before_any_step(two, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="checkpoints: cannot be written"):
        Checkpoints(two, WORLD).newest()


def test_a_link_bears_the_name_of_the_step_it_leads_to(two, caplog):
    folder = two / "checkpoints/step_00000008"
    folder.rename(two / "elsewhere")
    folder.symlink_to(two / "elsewhere")
    (two / "checkpoints/step_00000072").symlink_to(two / "elsewhere")
    with caplog.at_level(logging.WARNING, "dit_fast"):
        assert_is_step(Checkpoints(two, WORLD).newest(), 8)
    assert "is of step 8, but the folder's name says step 72" in caplog.text
    save(two, 12, keep=1)
    assert not [path.name for path in folder.parent.iterdir() if path.name.startswith("step_00000008")]
    assert (two / "elsewhere/MANIFEST.json").exists()


@pytest.mark.parametrize("fault", ["missing", "shape", "dtype", "more"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, fault, kind):
    save(tmp_path, 4)
    checkpoint = Checkpoints(tmp_path, WORLD).newest()
    trained = {name: torch.empty(shape) for name, shape in SHAPES.items()}
    expected = {each: {**trained, **UNTRAINED.get(each, {})} for each in KINDS} | {"rest": {**UNTRAINED["rest"]}}
    check_fits(checkpoint, expected)
    chosen = expected[kind]
    if fault == "missing":
        chosen["c"] = torch.empty(1)
    elif fault == "more":
        del chosen["a.bias"]
    else:
        chosen["a.bias"] = torch.empty(1) if fault == "shape" else torch.empty(3, dtype=torch.float64)
    with pytest.raises(CheckpointError, match=r"'(c|a\.bias)'.* was it made by another"):
        check_fits(checkpoint, expected)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "frozen"])
def test_what_is_not_finite_is_neither_saved_nor_read(two, kind, background, monkeypatch, caplog):
    broken, untrained = Weights(12), {each: {**tensors} for each, tensors in UNTRAINED.items()}
    real = broken.full_state

    def full_state(asked):
        for name, tensor in real(asked):
            yield name, torch.full_like(tensor, float("inf")) if (asked, name) == (kind, "b") else tensor

    broken.full_state = full_state
    if kind == "frozen":
        untrained["model"]["pos"] = torch.full((2, 3), float("nan"))
    untrained["rest"]["a.bias"] = torch.full((3,), 0.5 if kind != "rest" else float("nan"))
    checkpoints = Checkpoints(two, WORLD, keep=1, background=background)
    checkpoints.save(broken, untrained, {"step": 12})
    with pytest.raises(Diverged, match=r"'(b|pos|a\.bias)' is not finite after step 12") as raised:
        checkpoints.settle()
    assert raised.value.steps == (12, 12)
    assert checkpoints.settle()  # told once
    assert sorted(path.name for path in (two / "checkpoints").glob("step_*")) == ["step_00000004", "step_00000008"]
    monkeypatch.setattr(Checkpoints, "_look_at_values", lambda *arguments: None)
    Checkpoints(two, WORLD).save(broken, untrained, {"step": 12})  # as an older version did
    monkeypatch.undo()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dit_fast"):
        assert_is_step(Checkpoints(two, WORLD).newest(), 8)
    assert "is not finite; going back to step 8" in caplog.text


def test_never_starts_over_in_silence(tmp_path):
    save(tmp_path, 4)
    _damage(tmp_path / "checkpoints/step_00000004/ema.safetensors", "flip")
    with pytest.raises(ValueError, match=r"ema\.safetensors.*sha256.*step 0"):
        Checkpoints(tmp_path, WORLD).newest()
    assert (tmp_path / "checkpoints/step_00000004").is_dir()


def test_only_the_files_that_are_read_are_verified(tmp_path):
    save(tmp_path, 4)
    _damage(tmp_path / "checkpoints/step_00000004/ema.safetensors", "flip")
    assert newest_checkpoint(tmp_path, kinds=("model",))[0].step == 4
    assert newest_checkpoint(tmp_path, kinds=("ema",))[0] is None
    assert newest_checkpoint(tmp_path)[0] is None


def test_another_format_is_refused(tmp_path):
    save(tmp_path, 4)
    manifest = tmp_path / "checkpoints/step_00000004/MANIFEST.json"
    manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 3'))
    with pytest.raises(CheckpointError, match="version 3; this dit_fast reads"):
        open_checkpoint(manifest.parent)


@pytest.mark.parametrize("operation", ["write", "sync", "write_synced", "rename"])
def test_a_full_disk_leaves_a_warning_and_no_debris(tmp_path, monkeypatch, caplog, operation):
    save(tmp_path, 4)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files, operation, full)
        assert not save(tmp_path, 8)
    assert "checkpoint step_00000008 not written" in caplog.text
    assert "No space left on device" in caplog.text
    assert not list(tmp_path.glob("checkpoints/*.partial"))
    assert_is_step(Checkpoints(tmp_path, WORLD).newest(), 4)
    assert save(tmp_path, 12)
    assert_is_step(Checkpoints(tmp_path, WORLD).newest(), 12)


def test_what_fails_after_the_rename_costs_no_older_checkpoint(two, monkeypatch, caplog):
    """The new one is there, but perhaps not for good: it counts, and the others stay."""
    real = files.sync_folder

    def refuse(path):
        if path.name == "checkpoints":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(files, "sync_folder", refuse)
    assert save(two, 12, keep=1)
    assert "older checkpoints stay" in caplog.text
    assert [step for step, _ in step_folders(two)] == [12, 8, 4]


def test_free_space_is_looked_at_first(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    monkeypatch.setattr(files, "write", pytest.fail)
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
        save_free = files.free_bytes
        assert save_free(small) <= 1 << 20
        monkeypatch.setattr(files, "free_bytes", lambda path: 1 << 40)
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


class Moving(Weights):
    """An engine whose optimizer goes on: the saved tensors change in place."""

    def __init__(self, step):
        super().__init__(step)
        kept = {kind: dict(super(Moving, self).full_state(kind)) for kind in ("model", "ema", "exp_avg", "exp_avg_sq")}
        self.full_state = lambda kind: iter(kept[kind].items())
        self.kept = kept

    def go_on(self):
        for tensors in self.kept.values():
            for tensor in tensors.values():
                tensor.add_(1)


def test_a_save_in_the_background_is_of_its_step_however_slow_the_disk(tmp_path, monkeypatch, caplog):
    gate, real = threading.Event(), files.write
    monkeypatch.setattr(files, "write", lambda *arguments: gate.wait(30) and real(*arguments))
    checkpoints, engine = Checkpoints(tmp_path, WORLD, background=True), Moving(4)
    checkpoints.save(engine, UNTRAINED, {"step": 4, "note": "x"})
    engine.go_on()
    assert not list(tmp_path.glob("checkpoints/step_00000004"))
    checkpoints.look()  # nothing is known yet, and nothing waits
    assert not caplog.text
    monkeypatch.setattr("dit_fast.train.checkpoints.SLOW", 0.0)
    gate.set()
    assert checkpoints.settle()
    assert "training waited 0 s until checkpoint step_00000004 was written" in caplog.text
    assert_is_step(checkpoints.newest(), 4)
    checkpoints.save(engine, UNTRAINED, {"step": 8, "note": "x"})  # the same memory again
    assert checkpoints.settle()
    source = Checkpoints(tmp_path, WORLD).newest().source("model")
    assert torch.equal(source("a.weight"), engine.kept["model"]["a.weight"])


def test_what_a_disk_refuses_in_the_background_is_told_once_and_costs_nothing(tmp_path, monkeypatch, caplog):
    checkpoints = Checkpoints(tmp_path, WORLD, background=True)
    checkpoints.save(Weights(4), UNTRAINED, {"step": 4, "note": "x"})
    assert checkpoints.settle()
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", disk := Refusing())
        checkpoints.save(Weights(8), UNTRAINED, {"step": 8, "note": "x"})
        disk.met.wait(30)
        while checkpoints._under_way[1].is_alive():
            time.sleep(0.01)
        checkpoints.look()
        checkpoints.look()
    assert not checkpoints.settle()
    (line,) = [record.getMessage() for record in caplog.records]
    assert (
        line == "checkpoint step_00000008 not written: [Errno 28] No space left on device; earlier ones are untouched"
    )
    assert checkpoints.written == 4
    assert_is_step(checkpoints.newest(), 4)
    assert not list(tmp_path.glob("checkpoints/*.partial"))


def test_a_copy_that_only_another_rank_saves_is_looked_at_too(tmp_path):
    """As on one of several ranks: of "a.weight" it saves nothing."""
    engine = Weights(4)

    def own_state(kind):
        for name, tensor in engine.full_state(kind):
            held = tensor.flatten()
            if (kind, name) == ("exp_avg", "a.weight"):
                held[7] = float("nan")
            yield name, 0, held[: 0 if name == "a.weight" else None], held

    engine.own_state = own_state
    checkpoints = Checkpoints(tmp_path, WORLD, background=True)
    checkpoints.save(engine, UNTRAINED, {"step": 4})
    with pytest.raises(Diverged, match=r"exp_avg of 'a\.weight' is not finite"):
        checkpoints.settle()


class Stream:
    """A CUDA stream as far as it matters here: what is queued is done when somebody waits for it."""

    def __init__(self, monkeypatch):
        self.queue, self.pinned = [], []
        copy, empty, stream = torch.Tensor.copy_, torch.empty, self

        def queued(target, source, non_blocking=False):
            if not non_blocking:
                return copy(target, source)
            self.queue.append(lambda: copy(target, source))
            return target

        def pinning(*sizes, pin_memory=False, **options):
            self.pinned.append(pin_memory)
            return empty(*sizes, **options)

        class Event:
            def record(self):
                self.place = len(stream.queue)

            def synchronize(self):
                stream.run(self.place)

        monkeypatch.setattr(torch.Tensor, "copy_", queued)
        monkeypatch.setattr(torch, "empty", pinning)
        monkeypatch.setattr(torch.cuda, "Event", Event)

    def run(self, end):
        for number in range(end):
            self.queue[number]()
            self.queue[number] = lambda: None


def test_on_cuda_copies_are_queued_before_the_next_update_and_read_after_they_arrived(tmp_path, monkeypatch):
    """The next step is queued when the save returns, and the thread that reads the copies runs late."""
    checkpoints, engine, gate = Checkpoints(tmp_path, WORLD, background=True), Moving(4), threading.Event()
    checkpoints._memory = HostMemory(torch.device("cuda"))
    wait = HostMemory.wait
    monkeypatch.setattr(HostMemory, "wait", lambda self: gate.wait(30) and wait(self))
    with monkeypatch.context() as context:
        stream = Stream(context)
        checkpoints.save(engine, UNTRAINED, {"step": 4, "note": "x"})
        assert len(stream.queue) > 16, "nothing waits for the copies"
        stream.queue.append(engine.go_on)
        stream.queue.append(lambda: pytest.fail("a wait for what was queued after the copies"))
        gate.set()
        assert checkpoints.settle()
        assert any(stream.pinned)
    assert_is_step(checkpoints.newest(), 4)


class Refusing:
    def __init__(self):
        self.met = threading.Event()

    def __call__(self, file):
        self.met.set()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_fault_of_the_program_in_the_background_is_raised_where_training_waits(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, WORLD, background=True)
    monkeypatch.setattr(files, "sync_folder", lambda path: 1 / 0)
    checkpoints.save(Weights(4), UNTRAINED, {"step": 4, "note": "x"})
    with pytest.raises(ZeroDivisionError):
        checkpoints.settle()
    assert not list(tmp_path.glob("checkpoints/step_00000004"))


def test_a_checkpoint_of_the_first_version_is_read(tmp_path):
    """Its tensors lie whole in their files, so nothing but the number differs."""
    save(tmp_path, 4)
    path = tmp_path / "checkpoints/step_00000004/MANIFEST.json"
    manifest = json.loads(path.read_bytes())
    del manifest["digest"]
    path.write_text(json.dumps({**manifest, "version": 1}))
    assert_is_step(Checkpoints(tmp_path, WORLD).newest(), 4)
