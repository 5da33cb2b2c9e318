"""Which seed moves what: initial weights, order of the samples, what a step draws."""

import pytest
import torch

from dit_fast.errors import ConfigError
from dit_fast.recipes import load
from dit_fast.runs import forbidden_changes
from dit_fast.train import loop
from dit_fast.train.__main__ import main
from tests.helpers.toy_runs import arguments


def first_batch(shards, run, monkeypatch, *overrides):
    """Initial weights, samples and state of the first micro-batch of a run."""
    seen = []

    class Loss(loop.TrainingLoss):
        def _state(self, batch, key):
            with torch.no_grad():
                weights = torch.cat([weight.flatten() for weight in self.parameters()])
            seen.append((weights.clone(), batch["moments"], key.normal(0, (4,))))
            return super()._state(batch, key)

    monkeypatch.setattr(loop, "TrainingLoss", Loss)
    assert main(arguments(shards, run, "run.steps=1", *overrides)) == 0
    return seen[0]


@pytest.fixture(scope="module")
def plain(shards, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return first_batch(shards, tmp_path_factory.mktemp("plain"), patch)


@pytest.mark.parametrize(
    ("keys", "moved"),
    [
        (("run.seed=5",), (True, True, True)),
        (("run.seed=5", "data.seed=0", "run.noise_seed=0"), (True, False, False)),
        (("data.seed=5",), (False, True, False)),
        (("run.noise_seed=5",), (False, False, True)),
        (("data.seed=none", "run.noise_seed=none"), (False, False, False)),
    ],
)
def test_each_seed_moves_its_own(plain, shards, tmp_path, monkeypatch, keys, moved):
    other = first_batch(shards, tmp_path, monkeypatch, *keys)
    assert tuple(not torch.equal(*pair) for pair in zip(plain, other, strict=True)) == moved


@pytest.mark.parametrize("key", ["data.seed", "run.noise_seed"])
def test_seeds_stay_when_a_run_is_resumed(key):
    plain, other = load("quickstart"), load("quickstart", [f"{key}=18446744073709551615"])
    assert forbidden_changes(plain, other) == [f"{key}: null -> {2**64 - 1}"]
    with pytest.raises(ConfigError, match=rf"{key}=-1 must lie in \[0, 2\^64\)"):
        load("quickstart", [f"{key}=-1"])
