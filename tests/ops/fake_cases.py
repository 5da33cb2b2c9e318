"""What fake_cuda.py runs: whole steps of recipes, four blocks deep and of full width, and single ops."""

from tests.ops import fake_ops
from tests.ops.fake_step import Trace, traced

# isort: split
import sys
from collections.abc import Callable
from functools import partial

from dit_fast.nn.attention import flash_attention
from tests.helpers.stand_ins import flash_attn

SMALL = ("model.depth=4", "engine.global_batch=32")
STEPS = {
    "diversedit-xl2-256": ((), ("model.skip_wiring=output",), ("model.residual_dtype=autocast",),
                           ("model.residual_dtype=bf16",),
                           ("model.qk_norm=true",), ("engine.precision=fp32",), ("optimizer.name=torch_fused_adamw",)),
    "diversedit-b2-512": ((),),
    "diversedit-l2-256": ((),),
}  # fmt: skip


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


CASES: dict[str, Callable[[], Trace]] = {**fake_ops.CASES, **_steps(), "step with flash-attn": _with_flash_attn}
