"""Dotted overrides, round trips through JSON, and errors that name the key and the nearest valid one."""

import json
from dataclasses import dataclass

import pytest

from dit_fast.config import TrainConfig, apply_overrides, diff, from_dict, to_dict
from dit_fast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Toy:
    name = "toy"
    weight: float = 0.5
    layers: tuple[int, ...] = (1, 2)
    depth: int | None = None


METHODS = {"toy": Toy}


def test_overrides_reach_every_kind_of_field():
    config = apply_overrides(
        TrainConfig(),
        [
            "optimizer.lr=2e-4",
            "engine.zero_stage=2",
            "run.steps=1e3",
            "run.tensorboard=false",
            "methods=toy",
            "methods.toy.layers=3,4,5",
            "methods.toy.depth=7",
        ],
        METHODS,
    )
    assert (config.optimizer.lr, config.engine.zero_stage, config.run.steps) == (2e-4, 2, 1000)
    assert config.run.tensorboard is False
    assert config.methods == (Toy(layers=(3, 4, 5), depth=7),)
    kept = apply_overrides(config, ["methods=toy", "methods.toy.depth=none"], METHODS)
    assert kept.methods == (Toy(layers=(3, 4, 5), depth=None),)
    assert apply_overrides(config, ["methods=none"], METHODS).methods == ()


def test_round_trip_through_json():
    config = apply_overrides(TrainConfig(), ["methods=toy", "methods.toy.weight=0.25", "flow.path=cosine"], METHODS)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config))), METHODS) == config


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimzer.lr=1", "optimizer"),
        ("optimizer.lrr=1", "optimizer.lr"),
        ("engine.zero_stage=5", "0, 1, 2, 3"),
        ("run.steps=many", "type int"),
        ("run.steps=1.5", "type int"),
        ("run.tensorboard=maybe", "type bool"),
        ("model=3", "group of keys"),
        ("run.steps.x=3", "single value"),
        ("methods=tov", "did you mean 'toy'"),
        ("methods.toy.weight=1", "not in this run"),
        ("run.steps", "key=value"),
    ],
)
def test_wrong_overrides_name_the_key_and_the_fix(assignment, message):
    with pytest.raises(ConfigError, match=message) as caught:
        apply_overrides(TrainConfig(), [assignment], METHODS)
    assert "\n" not in str(caught.value)


def test_unknown_keys_in_a_file_raise():
    values = to_dict(TrainConfig())
    values["model"]["skip_wirings"] = "input"
    with pytest.raises(ConfigError, match=r"model\.skip_wirings.*skip_wiring"):
        from_dict(TrainConfig, values, METHODS)


def test_diff_lists_changed_leaves_only():
    old = to_dict(TrainConfig())
    new = to_dict(apply_overrides(TrainConfig(), ["run.seed=3", "methods=toy"], METHODS))
    lines = diff(old, new)
    assert "run.seed: 0 -> 3" in lines
    assert any(line.startswith("methods.toy.weight: (absent) -> 0.5") for line in lines)
    assert len(lines) == 1 + 3 + 1  # the seed, three fields of the method, and the empty group that went away
