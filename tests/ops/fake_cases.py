"""What fake_cuda.py runs: whole steps of recipes, four blocks deep and of full width, and single ops."""

from tests.ops import fake_ops
from tests.ops.fake_step import Trace, traced

# isort: split
from collections.abc import Callable
from functools import partial

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


CASES: dict[str, Callable[[], Trace]] = {**fake_ops.CASES, **_steps()}
