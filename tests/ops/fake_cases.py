"""What fake_cuda.py runs: single ops, and whole steps of recipes, of full width and a few blocks deep.

Of each published recipe there is a step at its smallest size; those whose names begin with "size" are all others, and
are run where they are asked for. Resolution and batch change no launch but in its grid.
"""

from tests.ops import fake_ops
from tests.ops.fake_step import Trace, traced

# isort: split
import sys
from collections.abc import Callable
from functools import partial

from dit_fast.nn.attention import flash_attention
from dit_fast.recipes import PUBLISHED
from tests.helpers.stand_ins import flash_attn

SMALL = ("model.depth=4", "engine.global_batch=32")
STEPS = {
    "diversedit-xl2-256": ((), ("model.skip_wiring=output",), ("model.residual_dtype=autocast",),
                           ("model.residual_dtype=bf16",),
                           ("model.qk_norm=true",), ("engine.precision=fp32",), ("optimizer.name=torch_fused_adamw",)),
    "diversedit-b2-512": ((),),
    "diversedit-l2-256": ((),),
}  # fmt: skip

# Networks of others that they read from files are made of elements, and the fake GPU has none.
UNTRACED = {"haste": "an encoder", "repa_e": "an autoencoder"}
DEPTHS = {"layersync": 16, "sra": 20, "sra-dit": 16, "jit": 12, "ddt": 0}  # blocks, where 8 are too few; 0: all


def _published() -> dict[str, Callable[[], Trace]]:
    """By name, "step RECIPE" of the smallest size and "size RECIPE" of the others."""
    found = {}
    for names, (sizes, resolutions) in PUBLISHED.items():
        for name in names.split():
            plain = name.removeprefix("diversedit-")
            depth = DEPTHS.get(plain.rpartition("repa-")[2], 8)
            options = ("engine.global_batch=32", *([f"model.depth={depth}"] if depth else []))
            for place, size in enumerate(sizes.split() if plain not in UNTRACED else ()):
                recipe = f"{name}-{size}-{resolutions[0]}"
                first = place == 0 and name == plain
                found[f"{'step' if first else 'size'} {recipe}"] = partial(traced, recipe, options)
    return found


def _steps() -> dict[str, Callable[[], Trace]]:
    return {
        " ".join(("step", recipe, *options)): partial(traced, recipe, (*SMALL, *options))
        for recipe, variants in STEPS.items()
        for options in variants
    }


def _with_flash_attn() -> Trace:
    """The package is not here, and a stand-in checks the calls."""
    sys.modules["flash_attn"] = package = flash_attn()
    flash_attention.cache_clear()
    try:
        found = traced("diversedit-xl2-256", (*SMALL, "model.attention=flash"))
    finally:
        del sys.modules["flash_attn"]
        flash_attention.cache_clear()
    assert [(shape, round(72 * scale**2, 9)) for shape, scale in package.calls] == [
        ((32, 256, 16, 72), 1)
    ] * 8  # two steps
    return found


CASES: dict[str, Callable[[], Trace]] = {
    **fake_ops.CASES, **_steps(), "step with flash-attn": _with_flash_attn, **_published()
}  # fmt: skip
