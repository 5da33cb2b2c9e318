"""Checkpoints of LightningDiT (arXiv 2501.01423): its switches are read off the names and shapes of the entries."""

from collections.abc import Mapping

from torch import Tensor

from dit_fast.checkpoint.layout import BASE, Family, Known, read_layout, shape, with_labels
from dit_fast.checkpoint.official_time import reversed_state
from dit_fast.models import Backbone, LightningDiT
from dit_fast.models.reversed_sit import ReversedLightningDiT


def _empty(state: Mapping[str, Tensor], known: Known) -> ReversedLightningDiT:
    layout = read_layout(state, "lightningdit", known)
    layout.check_head("LightningDiT")
    parts = shape(state, "blocks.0.adaLN_modulation.1.weight", 2)[0] // layout.hidden_size
    config = LightningDiT.Config(
        **layout.settings(),
        norm="rms" if "blocks.0.norm1.weight" in state else "layer",
        mlp="swiglu" if "blocks.0.mlp.w12.weight" in state else "gelu",
        rope="feat_rope.freqs_cos" in state,
        adaln_shift=parts != 4,
    )
    return with_labels(ReversedLightningDiT(config, layout.head_channels), layout.null_row)


def _export(model: Backbone, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As they are, or, of a model trained here, with its time and sign folded in (exact up to rounding)."""
    return state if isinstance(model, ReversedLightningDiT) else reversed_state(state)


FAMILY = Family(LightningDiT, (*BASE[:4], "feat_rope", *BASE[4:]), _empty, _export)
