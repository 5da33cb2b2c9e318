"""Models by name."""

import dataclasses
from typing import Any

from dit_fast.errors import ConfigError
from dit_fast.models.base import PRESETS, Backbone
from dit_fast.models.ddt import DDT
from dit_fast.models.dit import DiT
from dit_fast.models.jit import JiT
from dit_fast.models.lightningdit import LightningDiT
from dit_fast.models.sit import SiT
from dit_fast.options import nearest, shown

BACKBONES: dict[str, type[Backbone]] = {backbone.__name__: backbone for backbone in (SiT, DiT, LightningDiT, JiT, DDT)}


def kind(name: str) -> str:
    """The key in `BACKBONES` of a model by name: what stands before the first "-". Raises ConfigError for another."""
    found = name.partition("-")[0]
    if found not in BACKBONES:
        raise ConfigError(f"unknown model {shown(name)}{nearest(name, PRESETS)}")
    return found


def new_model(config: Any) -> Backbone:
    """The bare model of a configuration, newly initialised. Raises ConfigError where it refuses the configuration."""
    make: Any = BACKBONES[kind(config.name)]
    return make(config)


def build_model(name: str, **settings: Any) -> Backbone:
    """A new model by name ("SiT-XL/2"); `settings` are fields of its Config: input_size, num_classes, skip_wiring, ...

    Sizes that a data set would give are those of ImageNet at 256 pixels where they are not set: input_size 32,
    in_channels 4, num_classes 1000.
    Raises ConfigError for an unknown name or setting, with the nearest, and where the model refuses its configuration.
    """
    group: Any = BACKBONES[kind(name)].Config
    known = [item.name for item in dataclasses.fields(group)]
    for key in settings:
        if key not in known:
            raise ConfigError(f"unknown model setting '{key}'{nearest(key, known)}")
    return new_model(group(name=name, **{"input_size": 32, "in_channels": 4, "num_classes": 1000, **settings}))
