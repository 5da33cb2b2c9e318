"""Tokens of an encoder as latents, and the linear decoder that is fitted to them."""

import json

import numpy as np
import pytest
import torch

from dit_fast import autoencoders
from dit_fast.autoencoders import features, load_autoencoder, pixels
from dit_fast.autoencoders.features import FeatureAutoencoder
from dit_fast.autoencoders.patch_pca import to_float, to_patches
from dit_fast.errors import DataError
from dit_fast.preparation.verify import verify_dataset
from tests.helpers.golden import assert_close
from tests.helpers.no_gpu import no_gpu  # noqa: F401
from tests.helpers.shard_sets import build, contents, everything, make_images, rewrite


class Shuffler:
    """A token is a fixed invertible map of its patch and a constant, so that a linear decoder can be exact."""

    def __init__(self, weights="w"):
        self.identity, self.width = f"shuffler:{weights}", 48
        self.map = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0)))[0]

    def __call__(self, images, grid):
        return {"features": 3 * to_patches(images, images.shape[-1] // grid) @ self.map + 5}

    def shapes(self, grid):
        return {"features": (grid * grid, self.width)}

    def to(self, device):
        torch.device(device)  # raises for what is none, "auto" for example
        return self


@pytest.fixture(autouse=True)
def shuffler(monkeypatch):
    known = {"shuffler": lambda: Shuffler(), "other": lambda: Shuffler("other")}
    for module in ("dit_fast.autoencoders.features", "dit_fast.preparation.build"):
        monkeypatch.setattr(f"{module}.load_encoder", lambda spec: known[spec]())


@pytest.fixture
def array_file(tmp_path):
    images, labels = make_images()
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    return tmp_path / "images.npz"


def built(array_file, out, **options):
    return build(array_file, out, **{"autoencoder": "features:shuffler", "patch": 4, "device": "auto", **options})


def test_the_shards_hold_tokens_without_a_std_and_the_statistics_of_all_of_them(array_file, tmp_path):
    dataset = built(array_file, tmp_path / "out", dtype="float32")
    info, batch = dataset.info, everything(tmp_path / "out", ("image",))
    images = batch["image"].float() / 127.5 - 1
    assert (info.channels, info.size, info.std) == (48, 4, False)
    assert batch["moments"].shape == (43, 1, 48, 4, 4)
    tokens = Shuffler()(images, 4)["features"].transpose(1, 2).unflatten(2, (4, 4))
    assert_close(batch["moments"][:, 0], tokens, 1e-6)
    model_space = pixels.to_model_space(batch["moments"][:, 0], info)
    assert_close(model_space.mean((0, 2, 3)), torch.zeros(48), 0, 1e-4)
    assert_close(model_space.std((0, 2, 3), correction=0), torch.ones(48), 1e-4)
    verify_dataset(tmp_path / "out")


def test_half_the_bytes_of_latents_with_a_std(array_file, tmp_path):
    sizes = []
    for name, options in (("features", {}), ("pca", {"autoencoder": "pca", "channels": 48})):
        dataset = built(array_file, tmp_path / name, store_images=False, samples_per_shard=43, **options)
        sizes.append(dataset.info.shards[0].bytes)
    assert sizes[1] - sizes[0] == 43 * 48 * 4 * 4 * 2


def test_the_decoder_is_the_ridge_regression_and_its_error_that_of_images_left_out(array_file, tmp_path):
    dataset = built(array_file, tmp_path / "out", dtype="float32", shuffle=False)
    decoder = autoencoders.of(dataset)
    images = to_float(make_images()[0])
    left_out = (torch.arange(43) + 1) % 10 == 0
    x = Shuffler()(images, 4)["features"]
    fitted, y = x[~left_out].flatten(0, 1).double(), to_patches(images, 4)[~left_out].flatten(0, 1).double()
    mean, std = fitted.mean(0), fitted.std(0, correction=0)
    z = (fitted - mean) / std
    weight = torch.linalg.solve(z.mT @ z / len(z) + 1e-3 * torch.eye(48), z.mT @ (y - y.mean(0)) / len(z))
    tokens = x.transpose(1, 2).unflatten(2, (4, 4))
    expected = (((x.double() - mean) / std) @ weight + y.mean(0)).float()
    decoded = decoder.decode(tokens)
    assert_close(to_patches(decoded, 4), expected, 1e-4)
    error = (decoded - images)[left_out].square().mean()
    assert decoder.about["error"]["images"] == 4
    assert decoder.about["error"]["mse"] == pytest.approx(float(error), rel=1e-3)
    assert decoder.about["error"]["psnr"] == pytest.approx(10 * np.log10(4 / float(error)), abs=0.01)
    assert decoder.about["error"]["psnr"] > 20


def test_an_interrupted_build_goes_on_and_another_encoder_is_refused(array_file, tmp_path, monkeypatch):
    once = built(array_file, tmp_path / "once")
    assert built(array_file, tmp_path / "once").info == once.info
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "autoencoder.safetensors").write_bytes(contents(tmp_path / "once")["autoencoder.safetensors"])
    monkeypatch.setattr(FeatureAutoencoder, "fit", lambda *given: pytest.fail("fitted once more"))
    built(array_file, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "once")
    monkeypatch.undo()
    monkeypatch.setattr("dit_fast.autoencoders.features.load_encoder", lambda spec: Shuffler(spec))
    monkeypatch.setattr("dit_fast.preparation.build.load_encoder", lambda spec: Shuffler(spec))
    with pytest.raises(DataError, match="another autoencoder lies there"):
        built(array_file, tmp_path / "once", autoencoder="features:other")


def test_a_stored_decoder_serves_other_images(array_file, tmp_path):
    file = tmp_path / "once" / "autoencoder.safetensors"
    once = built(array_file, tmp_path / "once")
    images, labels = make_images(12, seed=3)
    np.savez(tmp_path / "more.npz", images=images, labels=labels)
    more = built(tmp_path / "more.npz", tmp_path / "more", autoencoder=f"features:{file}")
    assert more.info.autoencoder_identity == once.info.autoencoder_identity == "features:shuffler:w"
    assert more.info.scale != once.info.scale


def test_latents_are_decoded_where_the_encoder_is_not(array_file, tmp_path, monkeypatch):
    dataset = built(array_file, tmp_path / "out")
    monkeypatch.setattr("dit_fast.autoencoders.features.load_encoder", lambda spec: pytest.fail("read"))
    model_space = pixels.to_model_space(everything(tmp_path / "out")["moments"][:, 0], dataset.info)
    images = pixels.decode_images(model_space, dataset.info, autoencoders.of(dataset), "data")
    truth = everything(tmp_path / "out", ("image",))["image"].numpy().transpose(0, 2, 3, 1)
    assert np.abs(images.astype(int) - truth).mean() < 8


def test_encoding_with_other_weights_is_refused(array_file, tmp_path, monkeypatch):
    decoder = autoencoders.of(built(array_file, tmp_path / "out"))
    monkeypatch.setattr("dit_fast.autoencoders.features.load_encoder", lambda spec: Shuffler("lost"))
    with pytest.raises(DataError, match="is shuffler:lost, but the latents were made with shuffler:w"):
        decoder.encode(torch.zeros(1, 3, 16, 16))


def test_a_patch_that_does_not_divide_the_image_is_refused(array_file, tmp_path):
    with pytest.raises(DataError, match="image size 16 is not a multiple of patch=5"):
        built(array_file, tmp_path / "out", patch=5)


def test_a_constant_channel_cannot_be_scaled(array_file, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Shuffler, "__call__", lambda self, images, grid: {"features": torch.ones(len(images), grid**2, 48)}
    )
    with pytest.raises(DataError, match=r"channel 0 of the latents is the same in all samples \(48 such"):
        built(array_file, tmp_path / "out")


@pytest.mark.parametrize("damage", ["format", "list", "shape"])
def test_a_foreign_file_is_named(array_file, tmp_path, damage):
    from safetensors.torch import save_file

    file = tmp_path / "x.safetensors"
    about = {"format": features.FORMAT if damage == "shape" else "?", "patch": 2, "encoder": "a"}
    about = [about] if damage == "list" else about
    save_file({"weight": torch.zeros(3, 5), "bias": torch.zeros(12)}, file, {"about": json.dumps(about)})
    with pytest.raises(DataError, match="misshapen" if damage == "shape" else "not a decoder of features"):
        load_autoencoder(f"features:{file}")


def test_an_older_reader_would_be_told_to_update(array_file, tmp_path):
    built(array_file, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["version"] == 3
    rewrite(tmp_path / "out", lambda content: content.update(version=2))
    with pytest.raises(DataError, match="moments"):
        everything(tmp_path / "out")
