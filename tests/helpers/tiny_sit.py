"""A small SiT of which every part shows in the output, and inputs for it."""

from typing import Any

import torch

from dit_fast.models import build_model

TINY = {
    "input_size": 8,
    "in_channels": 3,
    "hidden_size": 32,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 10,
}
WIRINGS = ("off", "input", "output")


def tiny_sit(seed=0, name="SiT-S/2", recompute="none", **arguments) -> Any:
    """A model whose zero-initialised layers are filled, so that every part shows in the output."""
    torch.manual_seed(seed)
    model = build_model(name, **{**TINY, **arguments})
    model.activation_checkpointing = recompute
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.abs().max() == 0:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model.eval()


def inputs_for(model, n=3, dtype=torch.float32):
    """x, t, y, as the model takes them."""
    generator = torch.Generator().manual_seed(5)
    x = {
        leaf: torch.randn((n, *shape), generator=generator, dtype=torch.float64).to(dtype)
        for leaf, shape in model.shapes.items()
    }
    t = torch.rand((n, 2)[: model.times], generator=generator, dtype=torch.float64)
    t = (1000 * t).long() if model.learns_variance else t.to(dtype)
    return x if model.class_token else x["image"], t, torch.randint(0, model.num_classes + 1, (n,), generator=generator)
