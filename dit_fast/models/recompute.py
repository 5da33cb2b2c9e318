"""Activation checkpointing: which activations of a part of the network live until its backward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry

from dit_fast.errors import UserError
from dit_fast.nn.attention import has_tangent
from dit_fast.ops.gelu_mlp import activation_again

T = TypeVar("T")
ActivationCheckpointing = Literal["none", "gelu", "selective", "full"]


def recomputed(which: ActivationCheckpointing, part: Callable[..., T], *given: Any) -> T:
    """`part(*given)`, whose backward computes again what `which` says: values and gradients are the same.

    "full": all but `given`. "selective": all but the results of matrix products and attention, which take most of the
    time, so norms, modulations, gates and activations. "gelu": all but the activation of an MLP with GELU, in its own
    backward. "none", or where no gradients are taken: nothing.
    Raises UserError for inputs that carry tangents.
    """
    if which == "none" or not torch.is_grad_enabled():
        return part(*given)
    if which == "gelu":
        with activation_again():
            return part(*given)
    if any(has_tangent(leaf) for leaf in tree_leaves(given) if isinstance(leaf, Tensor)):
        raise UserError(
            f"activation_checkpointing={which} recomputes no tangents: take them under torch.no_grad(), or set none"
        )
    options: dict[str, Any] = {"context_fn": _selective} if which == "selective" else {}
    return checkpoint(partial(_afresh, part), *given, use_reentrant=False, preserve_rng_state=False, **options)


def _afresh(part: Callable[..., T], *given: Any) -> T:
    """Without autocast's cache of weights: it would keep them from forward to backward, and what an earlier forward has
    put there would make the first computation another one than the second, which "selective" takes for a mistake."""
    cached = torch.is_autocast_cache_enabled()
    if torch.compiler.is_compiling() or not cached:
        return part(*given)
    torch.set_autocast_cache_enabled(False)
    try:
        return part(*given)
    finally:
        torch.set_autocast_cache_enabled(cached)


def _policy(context: object, op: Any, *given: object, **options: object) -> CheckpointPolicy:
    # What has a FLOP formula: torch's products and attention, and the ops of ours that are products. Some attention has
    # none.
    keep = getattr(op, "_overloadpacket", op) in flop_registry or "attention" in (name := str(op)) or "attn" in name
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


_selective = partial(create_selective_checkpoint_contexts, _policy)
