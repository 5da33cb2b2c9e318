"""The small autoencoder for trying REPA-E: what is written, and what is refused."""

import numpy as np
import pytest

from dit_fast.autoencoders import load_autoencoder
from dit_fast.autoencoders.patch_pca import to_float
from dit_fast.errors import ConfigError
from dit_fast.preparation.small_vae import main, train_small_vae
from tests.helpers.shard_sets import make_images


def test_it_learns_and_says_how_its_latents_are_scaled(array_file, tmp_path):
    pytest.importorskip("diffusers")
    out = tmp_path / "vae"
    assert main([str(array_file), str(out), "--size", "16", "--channels", "3", "--width", "8", "--steps", "30"]) == 0
    images = to_float(make_images()[0])
    autoencoder, first = load_autoencoder(f"diffusers:{out}"), tmp_path / "first"
    train_small_vae(make_images()[0], first, channels=3, width=8, steps=1)
    errors = []
    for each in (autoencoder, load_autoencoder(f"diffusers:{first}")):
        mean, _ = each.encode(images)
        assert mean.shape == (43, 3, 4, 4)
        errors.append(float((each.decode(mean) - images).abs().mean()))
    assert errors[0] < 0.8 * errors[1]
    scaled = autoencoder.encode(images)[0] * np.reshape(autoencoder.scale, (3, 1, 1)).astype("float32")
    assert 0.5 < float(scaled.std((0, 2, 3)).mean()) < 1.5


@pytest.mark.parametrize(
    ("options", "message"), [({"width": 12}, "a width that 8 divides"), ({"halvings": 5}, "16 is not a multiple of 32")]
)
def test_what_cannot_be_made_is_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train_small_vae(make_images()[0], tmp_path, steps=1, **options)
