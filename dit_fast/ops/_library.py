"""How an op becomes known to torch: `diversity_op.py` is the example to copy.

An op is a schema, a Python function that picks the implementation when it is called (so that a compiled graph is tied
to none), and a fake implementation that gives shapes without data. Gradients do not live here: a thin
autograd.Function calls a forward op and a backward op, which costs half of what `torch.library.custom_op` does and
compiles with fullgraph=True.
"""

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "dit_fast"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers `dit_fast::<schema>` for tensors on any device and returns the callable op.

    fake: same arguments, returns empty tensors of the right shapes, strides, dtypes and devices.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(torch.ops.dit_fast, name).default
