"""Formulations of training by name: what is drawn, what is lost, what denoises. A run has one."""

from dit_fast.objectives.base import Context, Objective
from dit_fast.objectives.ddpm import DDPM
from dit_fast.objectives.flow import Flow
from dit_fast.objectives.improved_mean_flow import ImprovedMeanFlow
from dit_fast.objectives.mean_flow import MeanFlow

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective for objective in (Flow, MeanFlow, ImprovedMeanFlow, DDPM)
}

__all__ = ["DDPM", "OBJECTIVES", "Context", "Flow", "ImprovedMeanFlow", "MeanFlow", "Objective"]
