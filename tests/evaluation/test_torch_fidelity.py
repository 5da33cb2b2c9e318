"""Against torch-fidelity with the same random Inception weights; skipped by name where it is not installed.

It and torchvision are in no extra: `pip install --no-deps --target FOLDER torchvision==0.28.0 torch-fidelity==0.4.0`
(of torch 2.13.0), then `PYTHONPATH=FOLDER pytest -m long tests/evaluation/test_torch_fidelity.py`. RECORD=1
before it records how far the two agree, in benchmarks/results/cpu/torch_fidelity.json.
"""

import importlib.util
from importlib.metadata import version

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast.cli import main
from dit_fast.evaluation.inception import Inception
from dit_fast.evaluation.measure import PARTS
from dit_fast.evaluation.metrics import frechet_distance, inception_score, kernel_distance, moments, precision_recall
from dit_fast.evaluation.records import read_evaluations
from tests.helpers.recording import recording

pytestmark = pytest.mark.long
COUNT, SIDE = 16, 40


@pytest.fixture(scope="module")
def fidelity():
    """The library, beside a torchvision whose compiled ops were built for another torch."""
    for name in ("torch_fidelity", "torchvision"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor d, Tensor s, float t) -> Tensor")
    import torch_fidelity

    return torch_fidelity, library


@pytest.fixture(scope="module")
def record(fidelity):
    versions = {name: version(name) for name in ("torch-fidelity", "torchvision")}
    with recording("torch_fidelity", ["end to end", "equal features"], **versions) as values:
        yield values


def side_by_side(ours, theirs, tolerance):
    """Of each metric both values and their relative difference, which is within the tolerance."""
    found = {
        name: {"ours": ours[name], "torch-fidelity": theirs[name], "relative": abs(ours[name] / theirs[name] - 1)}
        for name in ours
    }
    assert all(each["relative"] < tolerance for each in found.values()), found
    return found


def pictures(seed, count=COUNT):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    phase, tint = rng.uniform(0, 6, (count, 2, 1, 1)), rng.uniform(0.2, 1, (count, 1, 1, 3))
    wave = np.sin(9 * x + phase[:, 0]) * np.cos(7 * y + seed + phase[:, 1])
    return (
        (127.5 + 100 * wave[..., None] * tint + rng.normal(0, 8, (count, SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random ones, with which features differ from image to image: batch norm has the statistics of some."""
    torch.manual_seed(0)
    network = Inception().train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network(torch.from_numpy(pictures(2, 8)).permute(0, 3, 1, 2))
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


def test_end_to_end(fidelity, weights, tmp_path, record):
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        for i, picture in enumerate(pictures(seed)):
            Image.fromarray(picture).save(tmp_path / str(seed) / f"{i:04d}.png")
    theirs = fidelity[0].calculate_metrics(
        input1=str(tmp_path / "0"), input2=str(tmp_path / "1"), cuda=False, fid=True, isc=True, kid=True,
        kid_subset_size=COUNT, kid_subsets=1, feature_extractor="inception-v3-compat", cache=False, verbose=False,
        feature_extractor_weights_path=str(weights), batch_size=8, save_cpu_ram=True,
    )  # fmt: skip
    command = ["evaluate", str(tmp_path / "0"), "--reference", str(tmp_path / "1"), "-o", str(tmp_path / "out")]
    assert main([*command, "--network", f"torch-fidelity:{weights}", "--metrics", "fd,is,kd"]) == 0
    ours = read_evaluations(tmp_path / "out")[0].values
    names = {
        "FID": "frechet_inception_distance", "IS": "inception_score_mean", "KID": "kernel_inception_distance_mean"
    }  # fmt: skip
    theirs = {name: theirs[key] for name, key in names.items()}
    record["end to end"] = side_by_side({name: ours[name] for name in names}, theirs, 1e-4)


def test_equal_features(fidelity, record):
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    generator = torch.Generator().manual_seed(0)
    mixture = torch.randn(96, 96, generator=generator)
    x = torch.randn(700, 96, generator=generator) @ mixture
    y = 1.1 * torch.randn(600, 96, generator=generator) @ mixture + 0.4
    both = [metric_fid.fid_features_to_statistics(each.double()) for each in (x, y)]
    theirs = {"FID": metric_fid.fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]}
    ours = {"FID": frechet_distance(moments(x), moments(y))}
    theirs["IS"] = metric_isc.isc_features_to_metric(x, splits=PARTS, shuffle=False)["inception_score_mean"]
    ours["IS"] = inception_score(x, splits=PARTS)
    arguments = {"kid_subsets": 1, "kid_subset_size": 600, "verbose": False, "rng_seed": 0, "kid_degree": 3}
    wanted = metric_kid.kid_features_to_metric(x[:600].double(), y.double(), **arguments)
    theirs["KID"], ours["KID"] = wanted["kernel_inception_distance_mean"], kernel_distance(x[:600], y)
    arguments = {"prc_neighborhood": 3, "prc_batch_size": 10_000, "verbose": False, "cuda": False, "save_cpu_ram": True}
    wanted = metric_prc.prc_features_to_metric(y, x[:600], **arguments)
    theirs |= {name: wanted[name] for name in ("precision", "recall")}
    ours["precision"], ours["recall"] = precision_recall(y, x[:600])
    assert 0.1 < wanted["precision"] < 0.9
    record["equal features"] = side_by_side(ours, theirs, 1e-6)
