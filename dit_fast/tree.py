"""What is denoised: an image, or several tensors by name of which one is the image; and what it is told: labels, or
several conditions by name of which one is the label.
"""

from collections.abc import Callable

from torch import Tensor

from dit_fast.errors import UserError

# [N, C, H, W], or flat: {"image": [N, C, H, W], "class_token": [N, Z], ...}; conditions: [N], or {"label": [N], ...}
Tree = Tensor | dict[str, Tensor]


def each(function: Callable[..., Tensor], *trees: Tree) -> Tree:
    """function of the trees' leaves of one name, in the first tree's order; a tensor for tensors.

    Raises UserError where the trees do not have the same leaves.
    """
    if all(isinstance(tree, Tensor) for tree in trees):
        return function(*trees)
    named = [leaves(tree) for tree in trees]
    if any(tree.keys() != named[0].keys() for tree in named):
        raise UserError(f"trees with different leaves: {' and '.join(', '.join(tree) for tree in named)}")
    return {name: function(*(tree[name] for tree in named)) for name in named[0]}


def leaves(tree: Tree) -> dict[str, Tensor]:
    """The tree's tensors by name; a bare tensor is the image."""
    return {"image": tree} if isinstance(tree, Tensor) else tree


def image(tree: Tree) -> Tensor:
    """The image [N, C, H, W]. Raises UserError where the tree has none."""
    named = leaves(tree)
    if "image" not in named:
        raise UserError(f"a tree without an image: {', '.join(named) or 'it is empty'}")
    return named["image"]


def label(conditions: Tree) -> Tensor:
    """The labels [N] of conditions, which may be no more than that. Raises UserError where there is none."""
    if isinstance(conditions, Tensor):
        return conditions
    if "label" not in conditions:
        raise UserError(f"conditions without a label: {', '.join(conditions) or 'there are none'}")
    return conditions["label"]


def relabelled(conditions: Tree, labels: Tensor) -> Tree:
    """Conditions with other labels [N], the rest as it is."""
    return labels if isinstance(conditions, Tensor) else {**conditions, "label": labels}


def like(tree: Tree, named: dict[str, Tensor]) -> Tree:
    """Leaves by name as a tree of the form of another: its image alone where that is a bare tensor."""
    return named["image"] if isinstance(tree, Tensor) else named
