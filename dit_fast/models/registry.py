"""Models by name."""

import difflib
from typing import Any

from dit_fast.errors import ConfigError
from dit_fast.models.sit import SiT

# hidden_size, depth, num_heads (DiT, arXiv 2212.09748, Tab. 1); Nano is ours, for CPUs.
SIZES = {
    "Nano": (160, 6, 5),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
PRESETS: dict[str, dict[str, int]] = {
    f"SiT-{size}/{patch}": {"hidden_size": width, "depth": depth, "num_heads": heads, "patch_size": patch}
    for size, (width, depth, heads) in SIZES.items()
    for patch in ((2,) if size == "Nano" else (2, 4, 8))
}


def build_model(name: str, **overrides: Any) -> SiT:
    """A new model by name ("SiT-XL/2"); `overrides` are arguments of `SiT` (input_size, in_channels, num_classes, ...).

    Raises ConfigError for an unknown name, listing all names, or an unknown argument, naming the nearest.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ConfigError(f"unknown model '{name}'; {hint}Names: {', '.join(PRESETS)}")
    return SiT(**{**PRESETS[name], **overrides})
