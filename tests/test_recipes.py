"""The recipes of quick-start size."""

import itertools
import re
from pathlib import Path

import pytest

from dit_fast.options import diff, to_dict
from dit_fast.recipes import PUBLISHED, RECIPES, load
from dit_fast.train.__main__ import main as train

SMALL = [name for name in RECIPES if name.startswith("quickstart-")]


@pytest.mark.parametrize("name", SMALL)
def test_a_small_recipe_changes_objective_methods_and_model_of_the_quick_start(name):
    lines = diff(to_dict(load("quickstart")), to_dict(load(name)))
    keys = {line.partition(": ")[0] for line in lines}
    assert f'run.dir: "runs/quickstart/train" -> "runs/quickstart/{name.removeprefix("quickstart-")}"' in lines
    assert {key.partition(".")[0] for key in keys - {"run.dir"}} <= {"objective", "methods", "model", "preview", "data"}
    assert ("data.path" in keys) == name.endswith("rae")
    if not name.endswith("ddt"):  # which has no long skips
        assert load(name).model.skip_wiring == ("input" if name.startswith("quickstart-diversedit-") else "off")
    assert ("methods.diversedit.pairs" in keys) != name.startswith("quickstart-diversedit-")


def test_the_help_lists_every_recipe_once_in_few_lines(capsys):
    with pytest.raises(SystemExit):
        train(["--help"])
    lines = capsys.readouterr().out.split("recipes:")[1].split()
    parts = [[part.split(",") for part in re.split(r"[{}]", line)] for line in lines]  # sit-{b2,l2}-256
    found = [name for line in parts for name in map("".join, itertools.product(*line))]
    assert sorted(found) == sorted(RECIPES)
    assert len(lines) < len(RECIPES) / 3


def test_the_readme_lists_the_recipes_of_the_papers():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    assert [name for names in PUBLISHED for name in names.split() if f"`{name}-" not in text] == []


def test_a_list_of_values_is_emptied():
    for text in ("none", ""):
        (method,) = load("quickstart-repa", ["methods.repa.encoders=a,b", f"methods.repa.encoders={text}"]).methods
        assert method.encoders == ()
