"""Fields that an encoder makes, and the command that adds fields."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast.cli import main
from dit_fast.errors import UserError
from dit_fast.preparation import build as building
from dit_fast.preparation import fields as adding
from dit_fast.preparation.fields import add_encoded
from dit_fast.preparation.vae_sd import import_vae_sd
from dit_fast.preparation.verify import verify_dataset
from tests.helpers.shard_sets import CLASSES, COUNT, build, everything, make_images, make_tree

NAMES = ("features", "class_token")


class Encoder:
    identity = "toy:1"

    def shapes(self, grid):
        return {"features": (grid * grid, 3), "class_token": (3,)}

    def to(self, device):
        self.device = device
        return self

    def __call__(self, images, grid):
        tokens = torch.nn.functional.adaptive_avg_pool2d(images, grid).flatten(2).transpose(1, 2)
        return {"features": tokens, "class_token": images.mean((2, 3))}


@pytest.fixture(autouse=True)
def _toy_encoder(monkeypatch):
    for module in (building, adding):
        monkeypatch.setattr(module, "load_encoder", lambda spec: Encoder())


def test_from_the_stored_images_and_from_their_source(copied, array_file, tmp_path):
    info = add_encoded(copied, NAMES, "toy", progress=False).info
    assert info.field("class_token").shards == info.field("features").shards  # one pass, one family
    verify_dataset(copied)
    batch = everything(copied, ("image", *NAMES))
    expected = Encoder()(batch["image"].float() / 127.5 - 1, 2)
    for name in NAMES:
        torch.testing.assert_close(batch[name], expected[name].half().float())
    build(array_file, tmp_path / "bare", store_images=False)
    add_encoded(tmp_path / "bare", NAMES, "toy", images=array_file, dtype="float32", progress=False)
    batch = everything(tmp_path / "bare", NAMES)
    for name in NAMES:
        torch.testing.assert_close(batch[name], expected[name])


def test_what_cannot_be_encoded_is_one_line(copied, array_file, tmp_path):
    build(array_file, tmp_path / "bare", store_images=False)
    images, labels = make_images(seed=1)
    np.savez(tmp_path / "others.npz", images=images, labels=labels, class_names=np.array(CLASSES))
    for folder, names, options, message in (
        (tmp_path / "bare", NAMES, {}, "holds no images to encode; give the source they were built from"),
        (tmp_path / "bare", NAMES, {"images": tmp_path / "others.npz"}, "others.npz: not the images that"),
        (copied, ["x"], {}, "encoder toy:1 gives features, class_token, but no 'x'"),
        (copied, NAMES, {"token_grid": 5}, "token_grid=5 is outside 1..4"),
        (copied, NAMES, {"batch_size": 0}, "batch_size=0"),
    ):
        with pytest.raises(UserError) as caught:
            add_encoded(folder, names, "toy", progress=False, **options)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_command(built, tmp_path, capsys):
    folder, array = shutil.copytree(built, tmp_path / "copy"), tmp_path / "tokens.npy"
    np.save(array, np.arange(COUNT, dtype=np.int64))
    command = ["shards", "add-field", str(folder), "tokens", "--array", str(array), "--no-progress"]
    assert main(command) == 0
    assert "field        tokens [] int64 (array:" in capsys.readouterr().out
    assert main([*command[:3], *NAMES, "--encoder", "toy", "--no-progress", "--dtype", "float32"]) == 0
    assert "field        class_token [3] float32 (toy:1), in 6 shards of its own" in capsys.readouterr().out
    assert main(["shards", "verify", str(folder)]) == 0
    assert "tokens-000005.tar: ok\nfeatures-000000.tar: ok" in capsys.readouterr().out
    assert main(["shards", "index", str(folder)]) == 0
    assert "tokens-000005.tar: 3 samples" in capsys.readouterr().out
    for words, message in (
        (["b", "c"], "--array gives one field, not b, c"),
        (["b", "--token-grid", "2"], "--token-grid belongs to --encoder"),
    ):
        assert main(["shards", "add-field", str(folder), *words, *command[4:]]) != 0
        assert message in capsys.readouterr().err


def make_pictures(root, count=9, size=32):
    """The tree of pictures beside a vae-sd tree of `make_tree`, numbered as it is, listed in another order."""
    images, _ = make_images(count, size)
    labels = []
    for number in reversed(range(count)):
        name = f"{number // 4:05d}/img{number:08d}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number]).save(root / name)
        labels.append([name, number % 5])
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.fixture
def tree(tmp_path):
    """(folder with both trees, shards of the latents, pictures by key)."""
    make_tree(tmp_path / "data" / "vae-sd")
    import_vae_sd(tmp_path / "data" / "vae-sd", tmp_path / "imported", samples_per_shard=4, progress=False)
    return tmp_path / "data", tmp_path / "imported", make_pictures(tmp_path / "data" / "images")


def test_an_imported_tree_gets_features_of_its_pictures(tree, capsys):
    data, imported, pictures = tree
    command = ["shards", "add-features", str(imported), "features_b", "class_token", "image", "--encoder", "toy"]
    assert main([*command, "--images", str(data), "--dtype", "float32", "--no-progress", "--device", "cpu"]) == 0
    assert "field        features_b [4, 3] float32 (toy:1), in 3 shards of its own" in capsys.readouterr().out
    batch, expected = everything(imported, ("image", "features_b", "class_token")), Encoder()(pictures / 127.5 - 1, 2)
    assert torch.equal(batch["image"], pictures)  # neither cropped nor flipped
    torch.testing.assert_close(batch["features_b"], expected["features"])
    torch.testing.assert_close(batch["class_token"], expected["class_token"])
    assert main(["shards", "add-features", str(imported), "--encoder", "toy", "--no-progress"]) == 0  # from those
    torch.testing.assert_close(everything(imported, ("features",))["features"], expected["features"].half().float())


def test_images_alone_need_no_encoder(tree):
    data, imported, pictures = tree
    add_encoded(imported, ["image"], images=data, progress=False)
    assert torch.equal(everything(imported, ("image",))["image"], pictures)
    with pytest.raises(UserError, match="'features' needs an encoder; give --encoder"):
        add_encoded(imported, ["features"], progress=False)


def relabel(folder):
    listed = json.loads((folder / "dataset.json").read_text())["labels"]
    listed[0][1] = (listed[0][1] + 1) % 5
    (folder / "dataset.json").write_text(json.dumps({"labels": listed}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda data: shutil.rmtree(data / "images"), "images/dataset.json: missing; give the folder"),
        (lambda data: relabel(data / "vae-sd"), "vae-sd: lists other labels than the shards"),
        (lambda data: relabel(data / "images"), "img-mean-std-00000008.npy: has label 3, .*img00000008.png 4 in"),
        (lambda data: (data / "images/00000/img00000001.png").unlink(), "png: named in dataset.json but missing"),
        (lambda data: make_pictures(data / "images", count=10), "lists 10 pictures for 9 latents"),
        (lambda data: make_pictures(data / "images", count=8), "img-mean-std-00000008.npy: has no picture in"),
        (lambda data: make_pictures(data / "images", size=64), "pictures are 64 pixels a side, .* are of 32"),
        (lambda data: (data / "images/00000/img00000000.png").write_bytes(b""), "00000000.png: not a readable image"),
    ],
)  # fmt: skip
def test_trees_that_do_not_fit_are_refused(harm, message, tree):
    data, imported, _ = tree
    harm(data)
    with pytest.raises(UserError, match=message) as caught:
        add_encoded(imported, ["features"], "toy", images=data, progress=False)
    assert "\n" not in str(caught.value)


def test_another_device_is_refused(copied):
    with pytest.raises(UserError, match=r"device 'tpu': valid are auto, cpu, cuda"):
        add_encoded(copied, ["features"], "toy", device="tpu", progress=False)
