"""Formulations of training by name: what is drawn, what is lost, what denoises. A run has one."""

from dit_fast.objectives.base import Context, Objective
from dit_fast.objectives.flow import Flow

OBJECTIVES: dict[str, type[Objective]] = {objective.name: objective for objective in (Flow,)}

__all__ = ["OBJECTIVES", "Context", "Flow", "Objective"]
