"""Training methods by name. A new method is one file here and one line in `METHODS`; the trainer stays as it is."""

from collections.abc import Sequence
from typing import Any

from dit_fast.data import DatasetInfo
from dit_fast.errors import ConfigError
from dit_fast.methods.base import Method, Term
from dit_fast.methods.contrastive_flow import ContrastiveFlow
from dit_fast.methods.dispersive import Dispersive
from dit_fast.methods.diversedit import DiverseDiT
from dit_fast.methods.haste import HASTE
from dit_fast.methods.internal_guidance import InternalGuidance, auxiliary
from dit_fast.methods.layersync import LayerSync
from dit_fast.methods.reg import REG
from dit_fast.methods.repa import REPA
from dit_fast.methods.repa_e import REPAE
from dit_fast.methods.self_transcendence import SelfTranscendence, StructureGuidance
from dit_fast.methods.sra import SRA
from dit_fast.methods.sra2 import SRA2
from dit_fast.models import Backbone

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        DiverseDiT,
        REPA,
        REPAE,
        REG,
        HASTE,
        SRA,
        Dispersive,
        StructureGuidance,
        SelfTranscendence,
        InternalGuidance,
        ContrastiveFlow,
        LayerSync,
        SRA2,
    )
}


def build_methods(configs: Sequence[Any], model: Backbone, data: DatasetInfo) -> tuple[Method, ...]:
    """The methods of these Config objects, bound to a model and a data set in this order.

    Raises ConfigError for a block that the model does not have, unless each leaf that the model denoises beside the
    image is added by one method, for an auxiliary head that none trains, and what the methods raise.
    """
    methods = tuple(METHODS[config.name](config, model, data) for config in configs)
    for method in methods:
        for block in sorted(method.blocks | method.attention):
            if not 0 <= block < model.depth:
                raise ConfigError(f"method '{method.name}' reads block {block}; this model has 0..{model.depth - 1}")
        if method.config.stop_step and _overrides(method, "state") and not _overrides(method, "lasting_terms"):
            raise ConfigError(
                f"methods.{method.name}.stop_step={method.config.stop_step}: the model denoises what this method "
                "makes; set it to 0 (never)"
            )
    _check_leaves(methods, model)
    if (depth := auxiliary(model)) and not any(isinstance(method, InternalGuidance) for method in methods):
        raise ConfigError(
            f"model.auxiliary_depth={depth} adds a head that no method of this run trains; set it to 0, or add "
            "internal_guidance to methods"
        )
    return methods


def _overrides(method: Method, hook: str) -> bool:
    return getattr(type(method), hook) is not getattr(Method, hook)


def _check_leaves(methods: Sequence[Method], model: Backbone) -> None:
    adding: dict[str, str] = {}
    for method in methods:
        for leaf in method.adds:
            if leaf in adding:
                raise ConfigError(f"methods '{adding[leaf]}' and '{method.name}' both add '{leaf}'; keep one of them")
            if leaf not in model.shapes:
                raise ConfigError(
                    f"method '{method.name}' adds '{leaf}', which this model does not denoise; remove one"
                )
            adding[leaf] = method.name
    for leaf in model.shapes:
        if leaf != "image" and leaf not in adding:
            able = ", ".join(name for name, method in METHODS.items() if leaf in method.adds)
            raise ConfigError(
                f"the model denoises '{leaf}' beside the image, and no method of this run adds it; set model.{leaf}=0, "
                f"or use one that does ({able})"
            )


__all__ = ["METHODS", "Method", "Term", "build_methods"]
