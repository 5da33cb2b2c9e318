"""What a step's host time cannot be less than: torch's operators alone, and autograd's hand-over of gradients."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]


def seconds(calls: list[Call], model: torch.nn.Module, rounds: int) -> dict[str, float]:
    """Of these operators, and of gradients for all of the model's trained parameters; medians of the thread's time."""
    return {"operators": _again(calls, rounds), "accumulation": _accumulation(model, rounds)}


def _again(calls: list[Call], rounds: int) -> float:
    """Seconds of these calls of operators by themselves, one after the other."""
    taken = []
    with torch.no_grad():
        for _ in range(rounds):
            start = time.thread_time()
            for function, args, options in calls:
                function(*args, **options)
            taken.append(time.thread_time() - start)
    return statistics.median(taken)


def _accumulation(model: Any, rounds: int) -> float:
    """Seconds of a backward that does nothing but hand each trained parameter a gradient that is there."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    taken = []

    class Gives(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *parameters: torch.Tensor) -> torch.Tensor:
            return parameters[0].new_zeros(())

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(given.pop() for _ in trained)

    for _ in range(rounds):
        given = [torch.empty_like(parameter) for parameter in reversed(trained)]
        model.zero_grad(set_to_none=True)
        loss = Gives.apply(*trained)
        start = time.thread_time()
        loss.backward()
        taken.append(time.thread_time() - start)
    model.zero_grad(set_to_none=True)
    return statistics.median(taken)
