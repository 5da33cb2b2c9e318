"""The recipes of quick-start size."""

import pytest

from dit_fast.options import diff, to_dict
from dit_fast.recipes import RECIPES, load

SMALL = [name for name in RECIPES if name.startswith("quickstart-")]


@pytest.mark.parametrize("name", SMALL)
def test_a_small_recipe_changes_objective_methods_and_model_of_the_quick_start(name):
    lines = diff(to_dict(load("quickstart")), to_dict(load(name)))
    keys = {line.partition(": ")[0] for line in lines}
    assert f'run.dir: "runs/quickstart/train" -> "runs/quickstart/{name.removeprefix("quickstart-")}"' in lines
    assert {key.partition(".")[0] for key in keys - {"run.dir"}} <= {"objective", "methods", "model", "preview"}
    assert load(name).model.skip_wiring == ("input" if name.startswith("quickstart-diversedit-") else "off")
    assert ("methods.diversedit.pairs" in keys) != name.startswith("quickstart-diversedit-")
