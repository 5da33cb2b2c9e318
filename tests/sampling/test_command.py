"""`dit-fast sample`: what it writes, how it goes on after a kill, and how ranks share it."""

import dataclasses
import errno
import fcntl
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast import autoencoders
from dit_fast.autoencoders.patch_pca import PatchPCA
from dit_fast.autoencoders.pixels import to_uint8
from dit_fast.checkpoint.run import load_run
from dit_fast.cli import main
from dit_fast.errors import UserError
from dit_fast.sampling import images as images_module
from dit_fast.sampling import options as options_module
from dit_fast.sampling.forms import NpzParts
from dit_fast.sampling.images import sample_images
from dit_fast.sampling.options import SampleOptions
from dit_fast.sampling.samples import Samples, write_samples
from tests.helpers.no_gpu import no_gpu  # noqa: F401
from tests.helpers.toy_runs import Ranks, environment, free_port, wait_for


def test_sample_command_writes_a_grid_or_an_archive(place, tmp_path, capsys):
    fixed = ["sample", str(place / "diverse"), "--classes", "2,0", "--per-class", "2", "--num-steps", "2"]
    assert main([*fixed, "--out", str(tmp_path / "a.png")]) == 0
    assert main([*fixed, "--out", str(tmp_path / "a.npz")]) == 0
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 128
    samples = Samples.load(tmp_path / "a.npz")
    assert samples.labels.tolist() == [2, 0, 2, 0]
    assert samples.text == "heun, 2 steps, guidance 2.5, seed 0"
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "a.png"), str(tmp_path / "a.npz")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--out", "a.jpg"], "must end in .npz, .tar or .png"),
        (["--out", "/proc/a.png"], "another place with --out"),
        (["--classes", "1,x"], "whole numbers"),
        (["--classes", ","], "whole numbers"),
        (["--classes", "1,0,1"], "class 1 is listed twice"),
        (["--classes", "3"], "labels are 0..2"),
        (["--sampler", "dpm"], "unknown sampler 'dpm'"),
        (["--cfg-scale", "nan"], "cfg_scale=nan"),
        (["--per-class", "0"], "per_class=0"),
        (["--count", "0"], "count=0"),
        (["--count", "3", "--per-class", "1"], "per_class and count are both given; drop one"),
        (["--labels", "random"], "say how many images in all with count"),
        (["--labels", "any"], "unknown labels 'any'; valid: balanced, random"),
        (["--autoencoder", "vae"], "unknown autoencoder 'vae'"),
        (["--num-steps", "0"], "num_steps=0"),
        (["--batch", "0"], "chunk (--batch)=0"),
        (["--data", "absent"], "no such folder"),
        (["--time-range", "1;0"], "--time-range 1;0: expected numbers with commas between, e.g. 0.999,0.001"),
        (["--time-range", "0,1"], "time_range must descend"),
        (["--time-shift", "0"], "time_shift=0.0 must be"),
        (["--omega", "2"], "omega is for a model that was trained with model.guidance_condition=true"),
        (["--ig-scale", "2"], "ig_scale=2.0 extrapolates from an auxiliary output, and this SiT has none"),
        (["--ig-scale", "inf"], "ig_scale=inf must be a finite number"),
        (["--ig-high", "1.5"], "ig_high=1.5 must be a time in [0, 1]"),
        (["--omega", "0"], "omega=0.0 must be a finite number above 0"),
        (["--t-min", "2"], "t_min=2.0 must be a time in [0, 1]"),
        (["--t-min", "0.6", "--t-max", "0.5"], "t_min=0.6 lies above t_max=0.5; swap them"),
        (["--diffusion", "sigma"], "sampler 'heun' takes no diffusion; drop it, or use sde"),
        (["--sampler", "sde", "--rtol", "1"], "sampler 'sde' takes no rtol; drop it, or use dopri5"),
        (["--sampler", "sde", "--last-step-size", "0"], "0 is 'none'"),
        (["--sampler", "sde", "--last-step-size", "0.5", "--time-range", "1,0.2"], "leads beyond the data"),
    ],
)
def test_wrong_options_are_one_line(place, capsys, changes, message):
    assert main(["sample", str(place / "diverse"), *changes]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_damaged_samples_are_named(tmp_path):
    path, images = tmp_path / "samples.npz", np.zeros((2, 4, 4, 3), np.uint8)
    Samples(images, np.array([0, 1]), 1, "whole").save(path)
    whole = path.read_bytes()
    for content in (b"", b"no archive", whole[:-40], whole[:200] + b"damage" + whole[206:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"samples\.npz"):
            Samples.load(path)
    for wrong in ((images[:1], np.array([0, 1])), (images + 0.0, np.array([0, 1])), (images[:0], np.array([], int))):
        Samples(*wrong, 1, "wrong").save(path)
        with pytest.raises(UserError, match=r"samples\.npz"):
            Samples.load(path)


def test_samples_of_a_checkpoint_are_written_where_asked(place, tmp_path, capsys):
    step = place / "plain" / "checkpoints" / "step_00000002"
    assert main(["sample", str(step)]) == 2
    assert "name a file with --out" in capsys.readouterr().err
    assert main(["sample", str(step), "--num-steps", "1", "-o", str(tmp_path / "a.npz")]) == 0
    assert Samples.load(tmp_path / "a.npz").step == 2


def sample(place, *options):
    return main(["sample", str(place / "diverse"), "--num-steps", "1", "--batch", "4", "--per-class", "4", *options])


def killed_after(count, monkeypatch, drawn):
    """From here on a drawing is interrupted once `drawn` holds so many chunks (None: it is not)."""
    real = sample_images

    def draw(*arguments, **options):
        for samples in real(*arguments, **options):
            if len(drawn) == count:
                raise KeyboardInterrupt
            drawn.append(samples.first)
            yield samples

    monkeypatch.setattr(images_module, "sample_images", draw)


@pytest.mark.parametrize("ending", [".npz", ".tar", ""])
def test_a_killed_drawing_goes_on_with_the_missing_chunks(place, tmp_path, monkeypatch, capsys, ending):
    whole, killed, drawn = tmp_path / f"whole{ending}", tmp_path / f"killed{ending}", []
    out, parts = ["-o", str(killed)], killed if not ending else tmp_path / f"killed{ending}.parts"
    assert sample(place, "-o", str(whole)) == 0
    killed_after(2, monkeypatch, drawn)
    assert sample(place, *out) == 130
    for option, there, here in (("seed", "0", "1"), ("guidance-high", "1.0", "0.7"), ("num-steps", "1", "2")):
        assert sample(place, *out, f"--{option}", here) == 2
        name = option.replace("-", "_")
        assert (
            f"{parts}: holds images of another command ({name} {there} there, {here} here)" in capsys.readouterr().err
        )
    killed_after(None, monkeypatch, drawn)
    assert sample(place, *out) == 0
    assert drawn == [0, 4, 8]
    assert "4 of 12 images drawn" in capsys.readouterr().err
    assert contents(killed) == contents(whole)
    assert {path.name for path in tmp_path.iterdir()} == {whole.name, killed.name}


def contents(place):
    """Bytes by name of a file or of a folder's files, except what says how it was drawn."""
    names = sorted(place.iterdir()) if place.is_dir() else [place]
    return {path.relative_to(place): path.read_bytes() for path in names if path.name != "sampling.json"}


def test_every_form_holds_the_same_images(place, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    for ending in (".npz", ".tar", ""):
        assert sample(place, "-o", str(tmp_path / f"a{ending}")) == 0
    samples = Samples.load(tmp_path / "a.npz")
    keys = [f"{number:09d}" for number in range(12)]
    tar = {item["__key__"]: item for item in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)}
    listed = json.loads((tmp_path / "a" / "dataset.json").read_text())["labels"]
    assert list(tar) == keys
    assert listed == [[f"{key}.png", label] for key, label in zip(keys, samples.labels.tolist(), strict=True)]
    for key, picture, label in zip(keys, samples.images, samples.labels, strict=True):
        png = (tmp_path / "a" / f"{key}.png").read_bytes()
        assert (tar[key]["png"], tar[key]["cls"]) == (png, b"%d" % label)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), picture)
    description = json.loads((tmp_path / "a" / "sampling.json").read_text())
    assert (description["form"], description["text"]) == ("png", samples.text)
    assert description["options"]["classes"] == [0, 1, 2]


def test_images_that_were_not_drawn_are_not_taken_over(place, tmp_path, capsys):
    (tmp_path / "000000000.png").touch()
    assert sample(place, "-o", str(tmp_path)) == 2
    assert "holds images without sampling.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["000000000.png"]


def test_ranks_share_a_folder(place, tmp_path, monkeypatch):
    assert sample(place, "-o", str(tmp_path / "whole")) == 0
    for rank in (1, 0):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
        for name, value in ranks.items():
            monkeypatch.setenv(name, str(value))
        assert sample(place, "--out", str(tmp_path / "folder")) == 0
        assert len(list((tmp_path / "folder").glob("*.png"))) == (4 if rank else 12)
    assert contents(tmp_path / "folder") == contents(tmp_path / "whole")


@pytest.mark.launch
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_processes_that_were_killed_give_the_same_set(place, tmp_path, size):
    """SIGKILL in the middle, then once more with the same command."""
    fixed = ["sample", str(place / "diverse"), "--num-steps", "4", "--batch", "1", "--count", "24"]
    assert main([*fixed, "--out", str(tmp_path / "whole")]) == 0
    command, out = [*fixed, "--out", str(tmp_path / "killed")], tmp_path / "killed"
    with Ranks(command, tmp_path / "log", size, ("-m", "dit_fast.cli")):
        wait_for(lambda: len(list(out.glob("*.png"))) >= 3)
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert 3 <= len(there) < 24
    with Ranks(command, tmp_path / "log", size, ("-m", "dit_fast.cli")) as ranks:
        assert ranks.wait() == [0] * size
    assert {name: (out / name).stat().st_mtime_ns for name in there} == there  # nothing was drawn again
    assert contents(out) == contents(tmp_path / "whole")


def test_a_command_that_cannot_draw_does_not_refuse_the_next(place, tmp_path, capsys):
    for out in ("a.npz", "folder"):
        if out == "folder":
            (tmp_path / out).mkdir()
            (tmp_path / out / "mine").touch()
        assert sample(place, "-o", str(tmp_path / out), "--class-token-cfg-scale", "2") == 2
        assert "is for a class token" in capsys.readouterr().err
        assert [path.name for path in tmp_path.rglob("*")] == (["folder", "mine"] if out == "folder" else [])
    assert sample(place, "-o", str(tmp_path / "folder")) == 0


def test_a_file_system_without_locks_is_warned_of(place, tmp_path, monkeypatch, caplog):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert sample(place, "-o", str(tmp_path / "a.npz")) == 0
    assert "a.npz.parts: lies on a file system without locks" in caplog.text


def test_chunks_of_other_weights_are_not_mixed(place, tmp_path):
    """Other weights may bear the same step. Without chunks too: another process may be drawing the first."""
    run = load_run(place / "plain")
    chosen = SampleOptions(classes=(0,), sampler="euler").resolved(run, run.dataset())
    NpzParts(tmp_path / "folder", run, chosen, 0)
    with pytest.raises(UserError, match=r"holds images of another command \(sha256 [0-9a-f]{64} there, 0 here\)"):
        NpzParts(tmp_path / "folder", dataclasses.replace(run, state={**run.state, "weights_sha256": "0"}), chosen, 0)


@pytest.mark.parametrize("form", ["npz", "tar"])
def test_a_damaged_chunk_or_description_is_named_with_the_fix(place, tmp_path, monkeypatch, capsys, form):
    out, folder = ["-o", str(tmp_path / f"a.{form}")], tmp_path / f"a.{form}.parts"
    killed_after(2, monkeypatch, [])
    assert sample(place, *out) == 130
    killed_after(None, monkeypatch, [])
    chunk, whole = folder / f"images_00000004.{form}", (folder / f"images_00000004.{form}").read_bytes()
    for damaged in (whole[:50], whole[: len(whole) // 1024 * 512], (folder / f"images_00000000.{form}").read_bytes()):
        if form == "npz" and len(damaged) == len(whole):
            continue  # what it holds is not numbered
        chunk.write_bytes(damaged)
        assert sample(place, *out) == 2
        line = f"images_00000004.{form}: damaged; remove it and give the same command again"
        assert line in capsys.readouterr().err
    chunk.unlink()
    assert sample(place, *out) == 0
    folder.mkdir()
    (folder / "sampling.json").write_bytes(b"\xff")
    assert sample(place, *out) == 2
    assert "its sampling.json is damaged" in capsys.readouterr().err


@pytest.mark.launch
def test_a_rank_that_starts_late_draws_nothing_again(place, tmp_path, monkeypatch):
    """All chunks are there, so rank 0 could join and remove them before rank 1 has looked."""
    with monkeypatch.context() as patch:
        patch.setattr(NpzParts, "write", lambda *_: exec("raise KeyboardInterrupt"))
        assert sample(place, "-o", str(tmp_path / "a.npz")) == 130
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    command = ["sample", str(place / "diverse"), "--num-steps", "1", "--batch", "4", "--per-class", "4"]
    late = subprocess.Popen(
        [sys.executable, "-m", "dit_fast.cli", *command, "-o", str(tmp_path / "a.npz")],
        env=environment(RANK="1", LOCAL_RANK="1"),
    )
    assert sample(place, "-o", str(tmp_path / "a.npz")) == 0
    assert late.wait(60) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.launch
def test_two_commands_do_not_draw_into_one_folder(place, tmp_path, capsys):
    assert sample(place, "-o", str(tmp_path / "folder")) == 0
    hold = "import fcntl, sys; f = open(sys.argv[1], 'rb+'); fcntl.lockf(f, fcntl.LOCK_EX, 1, 0); print(1); input()"
    command = [sys.executable, "-uc", hold, str(tmp_path / "folder" / "sampling.json")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert sample(place, "-o", str(tmp_path / "folder")) == 2
        other.communicate(b"\n")
    assert "folder: another process draws into it as rank 0; wait for it, or" in capsys.readouterr().err
    assert sample(place, "-o", str(tmp_path / "folder")) == 0


def test_a_file_written_in_parts_has_the_bytes_of_numpy(tmp_path):
    images, labels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8), np.arange(5)
    parts = [Samples(images[rows], labels[rows], 7, "text", rows.start) for rows in (slice(0, 3), slice(3, 5))]
    write_samples(tmp_path / "ours.npz", parts, 5)
    np.savez(tmp_path / "theirs.npz", arr_0=images, label=labels, step=np.int64(7), text=np.array("text"))
    assert (tmp_path / "ours.npz").read_bytes() == (tmp_path / "theirs.npz").read_bytes()


def test_the_command_has_the_options_of_the_class(place, monkeypatch, tmp_path):
    given = {
        "classes": (2, 1), "per_class": 3, "cfg_scale": 1.5, "guidance_low": 0.1, "guidance_high": 0.9,
        "guidance_bounds": "exclusive", "heun_guidance": "each", "cfg_channels": "first_three",
        "class_token_cfg_scale": 2.0, "omega": 3.0, "t_min": 0.25, "t_max": 0.75,
        "ig_scale": 1.25, "ig_low": 0.125, "ig_high": 0.5,
        "sampler": "sde", "num_steps": 4, "time_range": (0.9, 0.125), "time_shift": 2.0,
        "diffusion": "increasing-decreasing", "diffusion_norm": 0.5, "last_step": "tweedie", "last_step_size": 0.1,
        "state_refresh": 3, "seed": 5, "autoencoder": "pca:FILE", "weights": "model", "precision": "bf16", "chunk": 2,
    }  # fmt: skip
    solver = {"sampler": "dopri5", "atol": 1e-4, "rtol": 1e-2}
    number = {"count": 9, "labels": "random"}
    assert given.keys() | solver.keys() | number.keys() == SampleOptions.__dataclass_fields__.keys()
    seen = []
    monkeypatch.setattr(images_module, "sample_images", lambda run, options, *_, **__: seen.append(options) or 1 / 0)
    monkeypatch.setattr(options_module, "torchdiffeq", lambda: None)
    monkeypatch.setattr(options_module, "check_told", lambda *_: None)  # this model is told no guidance
    monkeypatch.setattr(options_module, "check_internal", lambda *_: None)  # and has one output
    flags = {"chunk": "--batch"}
    monkeypatch.setattr(images_module, "decoder", lambda run, _, dataset: autoencoders.of(dataset))
    for values in (given, {"classes": (0,), "per_class": 1, **solver}, number):
        words = [
            word
            for name, value in values.items()
            for word in (
                flags.get(name, "--" + name.replace("_", "-")),
                ",".join(map(str, value)) if isinstance(value, tuple) else str(value),
            )
        ]
        assert main(["sample", str(place / "plain"), *words, "-o", str(tmp_path / f"{len(seen)}.npz")]) == 1
    assert seen[0] == SampleOptions(**given)
    assert (seen[1].sampler, seen[1].atol, seen[1].rtol) == ("dopri5", 1e-4, 1e-2)
    assert (seen[2].count, seen[2].labels, seen[2].classes) == (9, "random", (0, 1, 2))


def test_a_folder_of_before_an_option_was_known_goes_on(place, tmp_path, capsys):
    """Then it had its default; another value is refused."""
    folder = tmp_path / "folder"
    assert sample(place, "-o", str(folder)) == 0
    description = folder / "sampling.json"
    content = json.loads(description.read_text())
    for name in ("time_shift", "diffusion", "guidance_bounds", "heun_guidance"):
        del content["options"][name]
    description.write_text(json.dumps(content))
    first = folder / "000000000.png"
    first.unlink()
    assert sample(place, "-o", str(folder)) == 0
    assert first.exists()
    capsys.readouterr()
    assert sample(place, "-o", str(folder), "--time-shift", "2") == 2
    assert "another command (time_shift None there, 2.0 here)" in capsys.readouterr().err


def test_shards_that_name_no_autoencoder_are_decoded_by_one_that_is_given(place, tmp_path, capsys):
    shards = shutil.copytree(place / "shards", tmp_path / "shards")
    description = json.loads((shards / "dataset.json").read_text())
    spec, description["autoencoder"]["spec"] = description["autoencoder"]["spec"], ""
    (shards / "dataset.json").write_text(json.dumps(description))
    moved = ["--data", str(shards), "-o", str(tmp_path / "a.npz")]
    assert sample(place, *moved) == 2
    assert "does not say where its autoencoder lies; give one, e.g. --autoencoder" in capsys.readouterr().err
    given = f"pca:{place / 'shards' / spec.removeprefix('pca:')}"
    assert sample(place, *moved, "--autoencoder", given) == 0
    assert sample(place, "-o", str(tmp_path / "b.npz")) == 0
    ours, theirs = (Samples.load(tmp_path / name) for name in ("a.npz", "b.npz"))
    np.testing.assert_array_equal(ours.images, theirs.images)
    assert ours.text == f"{theirs.text}, decoded by {given}"
    other = PatchPCA.fit(np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8), channels=5)
    other.save(tmp_path / "other.safetensors")
    assert sample(place, *moved, "--autoencoder", f"pca:{tmp_path / 'other.safetensors'}") == 2
    assert "decodes latents of 5 channels, and the run's have 12" in capsys.readouterr().err
    assert sample(place, "--data", str(shards), "--latents", "-o", str(tmp_path / "c.npz")) == 0
    latents = Samples.load(tmp_path / "c.npz")
    assert latents.images.dtype == np.float32
    decoded = PatchPCA.load(given.removeprefix("pca:")).decode(torch.from_numpy(latents.images))
    np.testing.assert_array_equal(to_uint8(decoded.numpy(), "here"), theirs.images)
    for more, message in ((["-o", "x.png"], "name a file for them, --out FILE.npz"), ([], "--out FILE.npz"),
                          (["-o", "x.npz", "--autoencoder", given], "drop --autoencoder")):  # fmt: skip
        assert sample(place, "--latents", *more) == 2
        assert message in capsys.readouterr().err
