"""Fields that an encoder makes, and the command that adds fields."""

import shutil

import numpy as np
import pytest
import torch

from dit_fast.cli import main
from dit_fast.errors import UserError
from dit_fast.preparation import build as building
from dit_fast.preparation import fields as adding
from dit_fast.preparation.fields import add_encoded
from dit_fast.preparation.verify import verify_dataset
from tests.helpers.shard_sets import CLASSES, COUNT, build, everything, make_images

NAMES = ("features", "class_token")


class Encoder:
    identity = "toy:1"

    def shapes(self, grid):
        return {"features": (grid * grid, 3), "class_token": (3,)}

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
