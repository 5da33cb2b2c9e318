"""Models by name."""

import dataclasses
import difflib
from typing import Any

from dit_fast.errors import ConfigError
from dit_fast.models.base import PRESETS, Backbone
from dit_fast.models.sit import SiT

BACKBONES: dict[str, type[Backbone]] = {backbone.__name__: backbone for backbone in (SiT,)}


def build_model(name: str, **settings: Any) -> Backbone:
    """A new model by name ("SiT-XL/2"); `settings` are fields of its Config: input_size, num_classes, skip_wiring, ...

    Sizes that a data set would give are those of ImageNet at 256 pixels where they are not set: input_size 32,
    in_channels 4, num_classes 1000.
    Raises ConfigError for an unknown name or setting, with the nearest, and where the model refuses its configuration.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ConfigError(f"unknown model '{name}'; {hint}Names: {', '.join(PRESETS)}")
    kind: Any = BACKBONES[name.partition("-")[0]]
    known = [item.name for item in dataclasses.fields(kind.Config)]
    for key in settings:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(known)}"
            raise ConfigError(f"unknown model setting '{key}'; {hint}")
    return kind(kind.Config(name=name, **{"input_size": 32, "in_channels": 4, "num_classes": 1000, **settings}))
