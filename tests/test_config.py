"""Dotted overrides, round trips through JSON, and errors that name the key and the nearest valid one."""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from dit_fast.errors import ConfigError
from dit_fast.methods import METHODS
from dit_fast.methods.diversedit import DiverseDiT
from dit_fast.methods.repa import REPA
from dit_fast.models import new_model
from dit_fast.objectives import OBJECTIVES, Flow
from dit_fast.options import diff, groups, keys, reference, to_dict
from dit_fast.recipes import load
from dit_fast.runs import (
    DataConfig,
    OptimizerConfig,
    TrainConfig,
    _adapters,
    changed,
    checked,
    forbidden_changes,
    stored,
)
from tests.helpers import fuzz


class Toy:
    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: ClassVar[str] = "toy"
        weight: float = 0.5
        layers: tuple[int, ...] = (1, 2)
        depth: int | None = None


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", Toy)


@pytest.mark.usefixtures("toy")
def test_overrides_reach_every_kind_of_field():
    config = changed(
        TrainConfig(),
        [
            "optimizer.lr=2e-4",
            "engine.zero_stage=2",
            "run.steps=1e3",
            "run.tensorboard=false",
            "methods=repa,toy",
            "methods.toy.layers=3,4,5",
            "methods.toy.depth=7",
        ],
    )
    assert (config.optimizer.lr, config.engine.zero_stage, config.run.steps) == (2e-4, 2, 1000)
    assert config.run.tensorboard is False
    assert config.methods == (REPA.Config(), Toy.Config(layers=(3, 4, 5), depth=7))
    kept = changed(config, ["methods=toy", "methods.toy.depth=none"])
    assert kept.methods == (Toy.Config(layers=(3, 4, 5), depth=None),)
    assert changed(config, ["run.seed=18446744073709551615"]).run.seed == 2**64 - 1  # exact
    assert changed(config, ["methods=none"]).methods == ()


def test_a_model_may_have_other_sizes_than_its_name():
    changes = ["model.depth=4", "model=SiT-Nano/2", "model.hidden_size=64", "model.num_heads=2", "model.qk_norm=yes"]
    config = changed(TrainConfig(), [*changes, "model.input_size=8", "model.in_channels=4", "model.num_classes=3"])
    config = stored(to_dict(changed(config, ["model.name=SiT-S/2"])))  # another name of one class keeps the settings
    model = new_model(config.model)
    assert (config.model.name, config.model.qk_norm, config.model.patch_size) == ("SiT-S/2", True, 0)
    assert (model.depth, model.hidden_size, model.num_heads, model.num_tokens) == (4, 64, 2, 16)


@pytest.mark.usefixtures("toy")
def test_round_trip_through_json():
    config = changed(TrainConfig(), ["methods=toy", "methods.toy.weight=0.25", "objective.path=cosine"])
    assert stored(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimzer.lr=1", "optimizer"),
        ("optimizer.lrr=1", "optimizer.lr"),
        ("engine.zero_stage=5", "0, 1, 2, 3"),
        ("run.steps=many", "type int"),
        ("run.steps=1.5", "type int"),
        ("run.tensorboard=maybe", "type bool"),
        ("data=3", "group of keys"),
        ("model=SiT-XXL/2", "unknown model 'SiT-XXL/2'; did you mean 'SiT-XL/2'"),
        ("model.name=GiT-XL/2", "unknown model 'GiT-XL/2'; did you mean 'SiT-XL/2'"),
        ("run.steps.x=3", "single value"),
        ("methods=tov", "did you mean 'toy'"),
        ("methods.toy.weight=1", "in this run"),
        ("run.steps", "key=value"),
        ("=1", "key=value"),
        ("a.b.c=1", "unknown configuration key 'a'"),
        ("methods=toy,toy", "'toy' is listed twice"),
        ("methods=", "unknown method ''.*methods=none"),
        ("optimizer.beta1=1.5", r"optimizer.beta1=1.5 must lie in \[0, 1\)"),
        ("optimizer.eps=0", r"optimizer.eps=0.0 must lie in \[1e-30, 1\]"),
        ("optimizer.lr=inf", "'optimizer.lr' must be of type float, not 'inf'"),
        ("optimizer.lr=1e999", r"optimizer.lr=inf must lie in \[0, 1e30\]"),
        ("optimizer.lr=1e-999", "type float"),  # would be 0
        ("data.num_workers=100000", r"must lie in \[0, 256\]"),
        ("run.seed=18446744073709551616", r"must lie in \[0, 2\^64\)"),
        ("run.seed=1e19999", "type int"),
        ("run.steps=0x10", "type int"),
        ("run.steps=1_000", "type int"),
        ("run.steps=none", "type int"),
        ("run.dir=a\0b", r"type str, not 'a\\x00b'"),
        ("model.attention=\x1b[31m\n", r"not '\\x1b\[31m'"),
        ("methods=\x1b[31m methods.toy.weight=1", r"add it to methods= \('\\x1b\[31m'\)"),
        ("methods=\x1b,\x1b", r"'\\x1b' is listed twice"),
    ],
)
@pytest.mark.usefixtures("toy")
def test_wrong_overrides_name_the_key_and_the_fix(assignment, message):
    with pytest.raises(ConfigError, match=message) as caught:
        changed(TrainConfig(), assignment.split(" "))
    assert str(caught.value).isprintable()


def test_a_class_is_chosen_by_name(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "toy", Toy)
    config = changed(TrainConfig(), ["objective.weight=2", "objective=toy"])  # the choice comes first
    assert config.objective == Toy.Config(weight=2.0)
    assert stored(json.loads(json.dumps(to_dict(config)))) == config
    assert changed(config, ["objective=toy"]) == config
    assert changed(config, ["objective.name=flow"]).objective == Flow.Config()
    with pytest.raises(ConfigError, match=r"'methods\.reg\.name' cannot be 'repa'; give the group under that name"):
        changed(TrainConfig(), ["methods=reg", "methods.reg.name=repa"])
    with pytest.raises(ConfigError, match=r"'model\.name' must be of type str, not '3'"):
        stored({"model": {"name": 3}})
    with pytest.raises(ConfigError, match="unknown objective 'flwo'; did you mean 'flow'"):
        changed(config, ["objective=flwo"])
    with pytest.raises(ConfigError, match=r"unknown configuration key 'objective\.path'"):
        changed(config, ["objective.path=cosine"])


def test_keys_that_moved_are_named_to_people_and_read_from_runs(tmp_path):
    with pytest.raises(ConfigError, match=r"'flow\.path' is now 'objective\.path'"):
        changed(TrainConfig(), ["flow.path=cosine"])
    old = {"flow": {"path": "cosine"}, "run": {"seed": 3}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(old))
    with pytest.raises(ConfigError, match=r"config\.json: 'flow\.path' is now 'objective\.path'"):
        load(str(path))
    (tmp_path / "metrics.jsonl").touch()  # the folder of a run
    new = changed(TrainConfig(), ["objective.path=cosine", "run.seed=3"])
    assert load(str(path)) == stored(old) == new
    assert forbidden_changes(stored(old), new) == []


def test_recomputation_was_once_a_setting_of_the_model():
    named = r"'model\.checkpoint_blocks' is now 'engine\.activation_checkpointing'"
    with pytest.raises(ConfigError, match=named):
        changed(TrainConfig(), ["model.checkpoint_blocks=true"])
    for old, which in ((True, "full"), (False, "none")):
        was = {"model": {"name": "DDT-B/2", "checkpoint_blocks": old}, "engine": {"compile": True}}
        new = ["model=DDT-B/2", "engine.compile=true", f"engine.activation_checkpointing={which}"]
        assert stored(was) == changed(TrainConfig(), new)


@pytest.mark.usefixtures("toy")
def test_diff_lists_changed_leaves_only():
    old = to_dict(TrainConfig())
    new = to_dict(changed(TrainConfig(), ["run.seed=3", "methods=toy"]))
    lines = diff(old, new)
    assert "run.seed: 0 -> 3" in lines
    assert any(line.startswith("methods.toy.weight: (absent) -> 0.5") for line in lines)
    assert len(lines) == 1 + 3 + 1  # the seed, three fields of the method, and the empty group that went away


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"optimizer": {"lr": null}}', "'optimizer.lr' must be of type float, not 'None'"),
        ('{"optimizer": {"lr": [1]}}', "type float"),
        ('{"run": {"steps": true}}', "type int, not 'True'"),
        ('{"run": {"steps": 1.5}}', "type int"),
        ('{"run": {"dir": ["a"]}}', "type str"),
        ('{"engine": {"zero_stage": true}}', "one of 0, 1, 2, 3"),
        ('{"optimizer": {"lr": NaN}}', "NaN is not a JSON number"),
        ('{"optimizer": {"lr": 1e999}}', "must lie in"),
        ('{"run": {"steps": %s}}' % ("9" * 5000), "JSON"),
        ('{"run": {"seed": 1, "seed": 2}}', "'seed' stands twice"),
        ('{"optimizer": 3}', "'optimizer' must be a group"),
        ('{"methods": ["repa"]}', "'methods' must be a group"),
        ('{"methods": {"repa": null}}', "'methods.repa' must be a group"),
        ('{"methods": {"repa": {"weight": -1}}}', r"methods.repa.weight=-1 must lie in \[0, 1e6\]"),
        ("[1]", "must be a group of keys"),
        ("", "not a JSON configuration"),
        ("[" * 100_000, "not a JSON configuration"),
        ("\xe9", "not a JSON configuration"),
    ],
)
def test_wrong_values_in_a_file_are_one_line(tmp_path, text, message):
    path = tmp_path / "given.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=message) as caught:
        load(str(path))
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).isprintable()


def test_files_that_cannot_be_read_are_one_line(tmp_path):
    (tmp_path / "folder.json").mkdir()
    for name in ("folder.json", "absent.json"):
        with pytest.raises(ConfigError, match=rf"{name}: cannot read this configuration"):
            load(str(tmp_path / name))
    (tmp_path / "marked.json").write_bytes(b'\xef\xbb\xbf{"run": {"seed": 7}}')  # as some editors write UTF-8
    assert load(str(tmp_path / "marked.json")).run.seed == 7


def test_what_is_made_in_python_passes_the_same_checks():
    assert checked(TrainConfig(optimizer=OptimizerConfig(lr=1))).optimizer.lr == 1.0
    wrong = [
        TrainConfig(optimizer=OptimizerConfig(lr=float("nan"))),
        TrainConfig(optimizer=OptimizerConfig(beta2=None)),
        TrainConfig(data=DataConfig(num_workers=True)),
        TrainConfig(data=None),
        TrainConfig(methods=None),
        TrainConfig(methods=(DiverseDiT.Config(k=0),)),
        TrainConfig(methods=(DiverseDiT.Config(weight="adaptive"),)),
        TrainConfig(methods=(DiverseDiT.Config(), DiverseDiT.Config())),
    ]
    for config in wrong:
        with pytest.raises(ConfigError):
            checked(config)


def test_keys_that_belong_together_are_checked_together():
    """low=0.6 alone is above the default high: the order of the assignments does not matter, their sum does."""
    low, high = "methods.diversedit.low=0.6", "methods.diversedit.high=0.9"
    first, second = (load("quickstart", order) for order in ([low, high], [high, low]))
    assert first == second
    with pytest.raises(ConfigError, match=r"low=0.6, high=0.5"):
        load("quickstart", [low])


ALL_KEYS = [key for path, group in groups(TrainConfig) for key in keys(group, path)]


def test_every_key_has_a_meaning_and_every_number_a_range():
    assert not [key.path for key in ALL_KEYS if not key.text]
    assert not [key.path for key in ALL_KEYS if key.type.split()[0] in ("int", "float") and not key.within]


def test_the_page_of_keys_is_current():
    page = Path(__file__).parents[1] / "docs/configuration.md"
    assert page.read_text() == reference(TrainConfig), "run: python -m dit_fast.recipes > docs/configuration.md"


def test_what_may_change_on_resume_is_said_beside_the_key():
    new = changed(TrainConfig(), ["run.steps=7", "preview.count=3", "run.seed=3", "optimizer.lr=1"])
    assert forbidden_changes(TrainConfig(), new) == ["optimizer.lr: 0.0001 -> 1.0", "run.seed: 0 -> 3"]


def test_random_configurations_are_valid_or_refused_in_one_line(tmp_path):
    outcomes = {fuzz.attempt(random.Random(seed), tmp_path) is None for seed in range(150)}
    assert outcomes == {True, False}


def test_a_stored_configuration_is_read_without_pydantic(monkeypatch):
    values = json.loads(json.dumps(to_dict(load("quickstart"))))
    monkeypatch.setitem(sys.modules, "pydantic", None)
    _adapters.cache_clear()
    assert to_dict(stored(values)) == values
    with pytest.raises(ConfigError, match=r"pip install 'dit_fast\[train\]'"):
        load("quickstart")
