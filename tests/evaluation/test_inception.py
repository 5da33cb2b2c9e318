"""The Inception network: its sizes and names, weights from a TensorFlow graph, the resizing of TensorFlow 1."""

import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dit_fast.errors import UserError
from dit_fast.evaluation import inception
from dit_fast.evaluation.graph import read_graph
from dit_fast.evaluation.inception import Inception, load_inception, resize_like_tensorflow


def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def constant(name, x, as_values=False):
    shape = b"".join(field(2, field(1, size)) for size in x.shape)
    content = field(5, x.tobytes()) if as_values else field(4, x.tobytes())
    value = field(8, field(1, 1) + field(2, shape) + content)
    return field(1, field(1, name) + field(2, "Const") + field(5, field(1, "value") + field(2, value)))


def norm(name, scaled):
    flag = field(5, field(1, "scale_after_normalization") + field(2, field(5, int(scaled))))
    epsilon = field(5, field(1, "variance_epsilon") + field(2, varint(4 << 3 | 5) + struct.pack("<f", 1e-3)))
    return field(1, field(1, name) + field(2, "BatchNormWithGlobalNormalization") + epsilon + flag)


@pytest.fixture(scope="module")
def state():
    """Few random numbers, repeated: drawing 24 million is slow."""
    with torch.device("meta"):
        wanted = Inception().state_dict()
    numbers = torch.randn(4099, generator=torch.Generator().manual_seed(0))
    found = {}
    for i, (name, x) in enumerate(wanted.items()):
        if not name.endswith("num_batches_tracked"):
            found[name] = numbers.roll(i).repeat(x.numel() // 4099 + 1)[: x.numel()].view(x.shape).contiguous()
    return found


def graph(state, scaled):
    parts = []
    for name, scope in inception._scopes():
        kernel = state[f"{name}.conv.weight"].permute(2, 3, 1, 0).contiguous().numpy()
        parts.append(constant(f"{scope}/conv2d_params", kernel))
        own = {"beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var", "gamma": "weight"}
        for theirs, ours in own.items():
            numbers = state[f"{name}.bn.{ours}"].numpy()
            parts.append(constant(f"{scope}/batchnorm/{theirs}", numbers, as_values=theirs == "beta"))
        parts.append(norm(f"{scope}/batchnorm", scaled))
    parts.append(constant("softmax/weights", state["fc.weight"].T.contiguous().numpy()))
    return b"".join([*parts, constant("softmax/biases", state["fc.bias"].numpy())])


def test_names_and_sizes_are_those_of_the_file_of_2015(state):
    assert len(state) + 94 == 566  # with a count per batch norm, as torch-fidelity's file has it
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert state["fc.weight"].shape == (1008, 2048)
    scopes = dict(inception._scopes())
    assert len(scopes) == 94
    assert scopes["Conv2d_4a_3x3"] == "conv_4"
    assert scopes["Mixed_5b.branch_pool"] == "mixed/tower_2/conv"
    assert scopes["Mixed_6a.branch3x3dbl_3"] == "mixed_3/tower/conv_2"
    assert scopes["Mixed_6d.branch1x1"] == "mixed_6/conv"
    assert scopes["Mixed_7a.branch7x7x3_4"] == "mixed_8/tower_1/conv_3"
    assert scopes["Mixed_7c.branch3x3dbl_3b"] == "mixed_10/tower_1/mixed/conv_1"


def test_shapes_of_the_features():
    with torch.device("meta"):
        found = Inception().eval()(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "pool": (2, 2048),
        "spatial": (2, 2023),
        "logits": (2, 1008),
    }


@pytest.mark.parametrize("scaled", [False, True])
def test_a_graph_of_tensorflow_gives_the_same_weights(state, tmp_path, scaled):
    (tmp_path / "graph.pb").write_bytes(graph(state, scaled))
    save_file(state, tmp_path / "weights.safetensors")
    ours, theirs = (load_inception(tmp_path / name).state_dict() for name in ("weights.safetensors", "graph.pb"))
    for name, x in ours.items():
        unscaled = name.endswith("bn.weight") and not scaled
        assert torch.equal(theirs[name], torch.ones_like(x) if unscaled else x), name


def test_files_of_other_networks_are_named(state, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"lacks 'Conv2d_1a_3x3\.conv\.weight'"):
        load_inception(tmp_path / "a.safetensors")
    for content in (b"no graph", graph(state, False)[:1000]):
        (tmp_path / "a.pb").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.pb: is no TensorFlow graph"):
            read_graph(tmp_path / "a.pb")
    (tmp_path / "a.pb").write_bytes(constant("b", np.zeros(1, np.float32)))
    with pytest.raises(UserError, match="holds no 'conv/conv2d_params'"):
        load_inception(tmp_path / "a.pb")


@pytest.mark.parametrize("size", [4, 7, 20])
def test_resizing_is_tensorflows(size):
    x = torch.rand(1, 2, size, size, generator=torch.Generator().manual_seed(1)) * 255
    found = resize_like_tensorflow(x, 7)
    for i in range(7):
        for j in range(7):
            y, z = i * size / 7, j * size / 7
            a, b = int(y), int(z)
            c, d = min(a + 1, size - 1), min(b + 1, size - 1)
            top, bottom = (x[..., row, b] * (1 - z + b) + x[..., row, d] * (z - b) for row in (a, c))
            torch.testing.assert_close(found[..., i, j], top * (1 - y + a) + bottom * (y - a), rtol=1e-5, atol=1e-4)
