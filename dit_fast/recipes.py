"""Recipes: functions that return a whole `TrainConfig`, and how a command line changes one.

Paper presets are named METHOD-SIZE-RESOLUTION (`diversedit-xl2-256`, `sit-b2-512`, `repa-l2-256`,
`diversedit-repa-b2-256`). They carry the settings of DiverseDiT (arXiv 2603.04239, Sec. 4.1 and Tab. A1): AdamW 1e-4
constant, batch 256, clip 1.0, EMA 0.9999, label dropout 0.1, 400K steps, linear path, uniform t; bf16 in place of
fp16. REPA is aligned at block 5 (B) or 8 (L, XL), coefficient 0.5.
"""

import dataclasses
import difflib
import json
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from dit_fast.config import (
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    PreviewConfig,
    RunConfig,
    TrainConfig,
)
from dit_fast.errors import ConfigError
from dit_fast.methods import METHODS
from dit_fast.options import Key, apply_overrides, from_dict, keys

METHOD_CONFIGS: dict[str, type] = {name: method.Config for name, method in METHODS.items()}
ENCODER_DEPTH = {"b2": 5, "l2": 8, "xl2": 8}  # aligned block, counted from 1


def paper(methods: Sequence[str], size: str, resolution: int) -> TrainConfig:
    """The published setting for one backbone size ("b2", "l2", "xl2") at 256 or 512 pixels (f8 latents, 4 channels)."""
    depth = ENCODER_DEPTH[size]
    settings: dict[str, dict[str, Any]] = {
        "diversedit": {"encoder_depth": depth if "repa" in methods else None},
        "repa": {"encoder_depth": depth},
    }
    name = f"{'-'.join(methods) or 'sit'}-{size}-{resolution}"
    return TrainConfig(
        model=ModelConfig(
            name=f"SiT-{size[:-1].upper()}/{size[-1]}",
            input_size=resolution // 8,
            in_channels=4,
            num_classes=1000,
            skip_wiring="input" if "diversedit" in methods else "off",
        ),
        methods=tuple(METHOD_CONFIGS[method](**settings[method]) for method in methods),
        run=RunConfig(dir=f"runs/{name}"),
    )


def quickstart() -> TrainConfig:
    """A small DiverseDiT on 8 x 8 x 12 latents (16 tokens) that learns ten classes in minutes on two CPU cores.

    Six blocks are diverse enough to sit at the paper's threshold of 0.1; the lower one lets the weight act throughout.
    """
    return TrainConfig(
        model=ModelConfig(name="SiT-Nano/2", skip_wiring="input"),
        data=DataConfig(path="runs/quickstart/shards", shuffle_group=0, num_workers=0),
        methods=(METHOD_CONFIGS["diversedit"](pairs="all", low=0.05),),
        optimizer=OptimizerConfig(lr=2e-3, beta2=0.95, warmup_steps=100, ema_decay=0.995),
        engine=EngineConfig(zero_stage=1, precision="fp32", global_batch=48),
        preview=PreviewConfig(every=500, count=20, num_steps=16, sampler="heun", cfg_scale=2.5),
        run=RunConfig(dir="runs/quickstart/train", steps=2000, log_every=20, checkpoint_every=500, keep_checkpoints=2),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "quickstart": quickstart,
    **{
        f"{'-'.join(methods) or 'sit'}-{size}-{resolution}": partial(paper, methods, size, resolution)
        for methods in ((), ("diversedit",), ("repa",), ("diversedit", "repa"))
        for size in ENCODER_DEPTH
        for resolution in (256, 512)
    },
}


def load(recipe: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a recipe, or of a JSON file written by a run, with `key=value` overrides applied.

    Raises ConfigError for an unknown recipe (with the nearest name), an unreadable file or a wrong override.
    """
    if recipe in RECIPES:
        config = RECIPES[recipe]()
    elif recipe.endswith(".json"):
        config = _from_file(Path(recipe))
    else:
        close = difflib.get_close_matches(recipe, RECIPES, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(RECIPES)}"
        raise ConfigError(f"unknown recipe '{recipe}'; {hint} (or the path of a .json configuration)")
    return apply_overrides(config, overrides, METHOD_CONFIGS)


def _from_file(path: Path) -> TrainConfig:
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text, parse_float=Decimal, parse_constant=_no_constant, object_pairs_hook=_no_repetition)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this configuration: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a JSON configuration: {error}") from None
    try:
        return from_dict(TrainConfig, values, METHOD_CONFIGS)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _no_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} stands twice in one group")
    return dict(pairs)


HEAD = """# Configuration

Every key of a run, generated from the code by `python -m dit_fast.recipes`. Keys are set as `key=value` on the command
line (`optimizer.lr=2e-4`) or in a `.json` configuration, where each dot is a level. Defaults are those of the classes;
a recipe may differ (`dit-fast train RECIPE --print-config` shows its values). A square bracket includes the bound, a
round one does not. Keys marked *yes* may change when a run is resumed.
"""


def reference() -> str:
    """docs/configuration.md: every key of a run and of each method, from the declarations."""
    everything = list(keys(TrainConfig))
    sections = [
        _table(group.name, group.type.__doc__, [key for key in everything if key.path.startswith(f"{group.name}.")])
        for group in dataclasses.fields(TrainConfig)
        if group.name != "methods"
    ]
    sections.append("## methods\n\n`methods=a,b` sets the list, `methods=none` empties it; order is kept.\n")
    for name, config in METHOD_CONFIGS.items():
        sections.append(_table(f"methods.{name}", config.__doc__, list(keys(config, f"methods.{name}."))))
    return "\n".join([HEAD, *sections])


def _table(title: str, text: str | None, rows: Sequence[Key]) -> str:
    lines = [f"## {title}\n", f"{text}\n", "| Key | Values | Default | Resumed | Meaning |", "|---|---|---|---|---|"]
    for key in rows:
        default = str(key.default).lower() if isinstance(key.default, bool | None) else str(key.default) or "(empty)"
        resumed = "yes" if key.resumes else ""
        lines.append(f"| `{key.path}` | {f'{key.type} {key.within}'.strip()} | {default} | {resumed} | {key.text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
