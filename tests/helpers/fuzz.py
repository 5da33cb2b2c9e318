"""Random configurations: overrides and JSON files of junk. Each must give a valid configuration or a one-line error."""

import copy
import json
import random

from dit_fast.errors import UserError
from dit_fast.options import groups, keys, to_dict
from dit_fast.recipes import RECIPES, load
from dit_fast.runs import TrainConfig, checked

DEFAULTS = {key.path: key.default for path, group in groups(TrainConfig) for key in keys(group, path)}
KEYS = list(DEFAULTS)
JUNK = [
    "", " ", "0", "1", "-1", "2", "0.5", "1.5", "1e3", "1e400", "-1e400", "1e-400", "1e999999", "1_000", "0x10",
    "nan", "inf", "none", "null", "true", "False", "yes", "[]", "{}", "[1,2]", "1,2", "all", "off", "input", "cosine",
    "adamw", "3.0",
    "9" * 5000, str(2**64), str(2**64 - 1), "\x1b[31mred", "two\nlines", "\0", "１２", "²", "é", "\udcff",
    "=", "a=b", "'", "x" * 300,
]  # fmt: skip
VALUES = [
    None, True, False, 0, 1, -1, 2, 0.5, 1.5, 1e308, -0.0, float("nan"), float("inf"), 10**40, 10**400, [], [1],
    {}, {"a": 1}, [[[]]], "", "1", "adamw", "none", "\x1b[0m", "\0", "x\ny",
]  # fmt: skip
NAMES = [
    "",
    ".",
    "..",
    "model",
    "methods",
    "methods.",
    "methods.repa",
    "run.dir.x",
    "a.b.c",
    "optimzer.lr",
    "\n",
    "modél.name",
]


def overrides(rng: random.Random) -> list[str]:
    """One to four assignments, most of them to keys that exist."""
    found = []
    for _ in range(rng.randint(1, 4)):
        key = rng.choice(KEYS) if rng.random() < 0.8 else rng.choice(NAMES)
        value = rng.choice(JUNK) if rng.random() < 0.5 else DEFAULTS.get(key, "")
        found.append(f"{key}{rng.choice(['='] * 8 + [' = ', ''])}{value}")
    if rng.random() < 0.3:
        found.insert(0, f"methods={rng.choice(['none', 'repa', 'repa,diversedit', 'repa,repa', ',', 'x', ''])}")
    return found


def document(rng: random.Random) -> str:
    """The text of a JSON configuration with some values, groups or bytes replaced."""
    tree = to_dict(RECIPES[rng.choice(list(RECIPES))]())
    for _ in range(rng.randint(1, 3)):
        place, group = tree, rng.choice(list(tree))
        while isinstance(place[group], dict) and place[group] and rng.random() < 0.9:
            place = place[group]
            group = rng.choice(list(place))
        place[group if rng.random() < 0.9 else rng.choice(NAMES)] = copy.deepcopy(rng.choice(VALUES))
    text = json.dumps(tree)
    if rng.random() < 0.2:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(["", "NaN", "{", "\ufeff", '"', "[" * 100_000]) + text[at + rng.randint(0, 9) :]
    return text


def attempt(rng: random.Random, folder) -> str | None:
    """Loads one random configuration; the error's line, or None for a valid one. Anything else is raised."""
    recipe = rng.choice(list(RECIPES))
    changes = overrides(rng)
    if rng.random() < 0.5:
        recipe, changes = str(folder / "given.json"), []
        with open(recipe, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(document(rng))
    try:
        config = load(recipe, changes)
    except UserError as error:
        line = str(error)
        assert line.isprintable(), repr(line)
        assert 0 < len(line) < 1000
        return line
    assert checked(config) == config
    (folder / "again.json").write_text(json.dumps(to_dict(config)))
    assert load(str(folder / "again.json")) == config
    return None
