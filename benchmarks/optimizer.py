"""The pass over the parameters after a backward: bytes counted, time measured. python -m dit_fast.benchmarks.optimizer

From gradients that lie there to clipped, updated weights and their average, by the engine of one process. Bytes are
those of the operators' arguments by their schemas, each tensor once per operator (read, or read and written, or written
alone), over the number of parameters; so they hold for any device on which the same operators run. Sides take turns.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dit_fast.benchmarks.results import RESULTS, environment, rounded, slug, write
from dit_fast.benchmarks.timing import clock_for, interleave, summarise
from dit_fast.errors import UserError
from dit_fast.models import build_model
from dit_fast.runs import TrainConfig, changed
from dit_fast.train.engine import SingleEngine
from dit_fast.world import World, single

MODEL, SAMPLES, SECONDS = "SiT-S/2", 15, 40.0
PLAIN = "torch: clip_grad_norm_, AdamW(foreach), foreach EMA"
OURS = "optimizer.name=adamw"
GATHERED = "ZeRO stages 1 and 2, after the gather: shadows"
NAMES = (OURS, "optimizer.name=torch_fused_adamw")
WRITTEN = {"copy_", "fill_", "zero_"}  # their first argument is written and not read


class Moved(TorchDispatchMode):
    """`bytes` that operators moved, and how many `calls` of them there were that moved any."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        moved = 0 if func.is_view else self._arguments(func, args, kwargs) + self._fresh(func, result)
        self.bytes, self.calls = self.bytes + moved, self.calls + bool(moved)
        return result

    @staticmethod
    def _arguments(func: Any, args: Any, kwargs: Any) -> int:
        times: dict[tuple[int, int], int] = {}  # (address, bytes) of a tensor: how often it passes
        name = func.overloadpacket.__name__
        for index, argument in enumerate(func._schema.arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if name == "_fused_adamw_" and argument.name == "grads":
                written = kwargs.get("grad_scale") is not None
            alone = written and (name in WRITTEN or "copy_" in name or argument.name in ("shadows", "scratch"))
            for x in _tensors(value):
                key = (x.data_ptr(), x.nbytes)
                times[key] = max(times.get(key, 0), 1 + (written and not alone))
        return sum(size * count for (_, size), count in times.items())

    @staticmethod
    def _fresh(func: Any, result: Any) -> int:
        if "empty" in func.overloadpacket.__name__ or any(each.alias_info for each in func._schema.returns):
            return 0
        return sum(x.nbytes for x in _tensors(result))


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, list | tuple):
        for item in nested:
            yield from _tensors(item)


class Gradients(nn.Module):
    """A loss whose model has the gradients already."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = build_model(MODEL, input_size=32, num_classes=1000, skip_wiring="input")
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)


def sides(world: World) -> dict[str, tuple[nn.Module, Callable[[], Any]]]:
    """By name: the loss and its pass. It keeps the gradients' values within what it is allowed to do to them."""
    found: dict[str, tuple[nn.Module, Callable[[], Any]]] = {}
    for name in NAMES:
        loss, config = Gradients(), changed(TrainConfig(), [name])
        engine = SingleEngine(loss, config, world)
        found[name] = loss, partial(_engine_pass, engine)
        if name == OURS:
            shadows, weights = zip(*engine._make_shadows(), strict=True)
            own = [weight.detach() for weight in weights]
            found[GATHERED] = loss, partial(torch._foreach_copy_, shadows, own)
    loss = Gradients().to(world.device)
    return found | {PLAIN: (loss, _plain_pass(list(filter(lambda each: each.requires_grad, loss.parameters()))))}


def _engine_pass(engine: SingleEngine) -> None:
    engine._update()


def _plain_pass(parameters: list[Any]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(parameters, 1e-4, weight_decay=0.0, foreach=True)
    ema = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def run() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(ema, [parameter.detach() for parameter in parameters], 1e-4)

    return run


def measure(world: World, seconds: float = SECONDS) -> dict[str, Any]:
    """By side: bytes and operators of a pass, and its median time."""
    found, prepared = {}, {}
    for name, (loss, run) in sides(world).items():
        gradients = [(each, each.grad) for each in loss.parameters() if each.grad is not None]
        prepared[name] = partial(_again, gradients, run)
        prepared[name](0, lambda: None)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with Moved() as moved:
            run()
        count = sum(each.numel() for each in loss.parameters() if each.requires_grad)
        found[name] = {"bytes_per_parameter": round(moved.bytes / count, 2), "operators": moved.calls}
    rounds = interleave(prepared, clock_for(world.device), samples=SAMPLES, seconds=seconds, warm_up=1)
    for name, turns in rounds.items():
        found[name]["median_s"] = summarise([times[0] for times in turns]).median
    return {"schema": 1, "run": "optimizer", "model": MODEL, "parameters": count, "sides": found}


def _again(gradients: list[tuple[Any, Any]], run: Callable[[], Any], _: int, mark: Callable[[], None]) -> None:
    for parameter, gradient in gradients:
        parameter.grad = gradient
    run()
    mark()


def main() -> int:
    if sys.argv[1:] not in ([], ["--write"]):
        raise UserError("usage: python -m dit_fast.benchmarks.optimizer [--write]")
    torch.set_num_threads(1)
    world = single()
    result = measure(world)
    for name, side in result["sides"].items():
        print(f"{side['bytes_per_parameter']:7.2f} B/parameter  {1e3 * side['median_s']:8.2f} ms  {name}")
    if sys.argv[1:]:
        write(RESULTS / slug(world.device) / "optimizer.json", rounded(result | environment(world.device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
