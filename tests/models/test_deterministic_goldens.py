"""methods.md §7.2: numbers of REPA's class (and of the two wirings added to it) on deterministically filled weights."""

import pytest
import torch

from dit_fast.nn.embeddings import TimestepEmbedder, sincos_position_embedding
from tests.helpers.cases import loop_over
from tests.helpers.deterministic_fill import fill, tiny_model

# wiring: v[0,0,0,0], v[1,3,7,5], sum, norm
VELOCITY = {
    "off": (-0.4159774207, -0.0385227422, -15.7178189893, 5.8676820480),
    "input": (-0.2351264336, 0.0276432158, 1.4296536510, 6.6751780392),
    "output": (-0.2187210841, -0.0240392409, 1.4042370201, 6.5059117676),
}
Y = torch.tensor([7, 1000])
T = torch.tensor([0.3, 0.85], dtype=torch.float64)


@pytest.mark.parametrize("wiring", VELOCITY)
def test_velocity_and_projector_tap(wiring):
    model = tiny_model(wiring)
    with torch.no_grad():
        v, features = model(fill("golden.x", (2, 4, 8, 8), 4), T, Y, taps=[1])
        z = model.projectors[0](features[1])
    ours = [v[0, 0, 0, 0], v[1, 3, 7, 5], v.sum(), v.norm(), z[1, 9, 3], z.sum(), z.norm()]
    expected = [*VELOCITY[wiring], 0.0274816529, 1.8170121949, 1.5823490419]
    torch.testing.assert_close(torch.stack(ours), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_position_embedding_is_the_published_one():
    embedding = sincos_position_embedding(64, (4, 4))
    assert embedding.dtype == torch.float32
    assert embedding.shape == (1, 16, 64)
    assert embedding.double().sum().item() == pytest.approx(525.9784436, rel=1e-7)
    row = embedding[0, 6, [0, 16, 32, 48]]
    torch.testing.assert_close(row, torch.tensor([0.9092974, -0.4161468, 0.8414710, 0.5403023]), rtol=0, atol=1e-7)


@loop_over("dtype", [torch.float32, torch.float64])
def test_time_frequencies_are_the_published_ones(dtype):
    features = TimestepEmbedder.frequencies(torch.tensor([0.3], dtype=dtype))
    assert features.shape == (1, 256)
    expected = torch.tensor([0.9553365111, 0.9612840414, 1.0, 0.2955202162, 0.2755594254], dtype=dtype)
    torch.testing.assert_close(features[0, [0, 1, 127, 128, 129]], expected, rtol=2e-7, atol=0)
