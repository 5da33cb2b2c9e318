"""Against torch-fidelity with the same random Inception weights; skipped by name where it is not installed.

It and torchvision are in no extra: `pip install --no-deps --target FOLDER torchvision==0.28.0 torch-fidelity==0.4.0`
(of torch 2.13.0), then `PYTHONPATH=FOLDER pytest -m long tests/evaluation/test_torch_fidelity.py`.
"""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast.cli import main
from dit_fast.evaluation.inception import Inception
from dit_fast.evaluation.measure import PARTS
from dit_fast.evaluation.metrics import frechet_distance, inception_score, kernel_distance, moments, precision_recall
from dit_fast.evaluation.records import read_evaluations

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


def test_end_to_end(fidelity, weights, tmp_path):
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
    print("ours", ours, "torch-fidelity", theirs)
    assert ours["FID"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["IS"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert ours["KID"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)


def test_equal_features(fidelity):
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    generator = torch.Generator().manual_seed(0)
    mixture = torch.randn(96, 96, generator=generator)
    x = torch.randn(700, 96, generator=generator) @ mixture
    y = 1.1 * torch.randn(600, 96, generator=generator) @ mixture + 0.4
    theirs = [metric_fid.fid_features_to_statistics(each.double()) for each in (x, y)]
    wanted = metric_fid.fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(wanted, rel=1e-6)
    wanted = metric_isc.isc_features_to_metric(x, splits=PARTS, shuffle=False)["inception_score_mean"]
    assert inception_score(x, splits=PARTS) == pytest.approx(wanted, rel=1e-6)
    arguments = {"kid_subsets": 1, "kid_subset_size": 600, "verbose": False, "rng_seed": 0, "kid_degree": 3}
    wanted = metric_kid.kid_features_to_metric(x[:600].double(), y.double(), **arguments)
    assert kernel_distance(x[:600], y) == pytest.approx(wanted["kernel_inception_distance_mean"], rel=1e-6)
    arguments = {"prc_neighborhood": 3, "prc_batch_size": 10_000, "verbose": False, "cuda": False, "save_cpu_ram": True}
    wanted = metric_prc.prc_features_to_metric(y, x[:600], **arguments)
    assert precision_recall(y, x[:600]) == pytest.approx((wanted["precision"], wanted["recall"]), rel=1e-6)
    assert 0.1 < wanted["precision"] < 0.9
