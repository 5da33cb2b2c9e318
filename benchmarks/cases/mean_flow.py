"""The loss of mean flow: an ordinary forward and a pass in forward mode that keeps nothing, or one pass for both."""

import torch
from torch import Tensor

from dit_fast.benchmarks.cases.case import Benchmark, Case, Inputs, Setting, Side, Work
from dit_fast.models import build_model
from dit_fast.models.base import Backbone
from dit_fast.objectives.mean_flow import squared_error, total_derivative

APART, TOGETHER = "forward, then jvp without gradients", "jvp with gradients"


def _model(setting: Setting) -> tuple[Backbone, int]:
    """A model of the setting's size with weights that are not zero, and a batch size."""
    name, size, batch = ("SiT-Nano/2", 8, 2) if setting.small else ("SiT-S/2", 32, 4)
    if setting.device.type == "cuda":
        name, batch = "SiT-B/2", 32
    torch.manual_seed(0)
    model = build_model(name, input_size=size, num_classes=10, times=2).to(setting.device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model, batch


def _cases(setting: Setting) -> list[Case]:
    model, batch = _model(setting)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def inputs(generator: torch.Generator) -> Inputs:
        shape = (batch, *model.shapes["image"])
        z, velocity = (torch.randn(shape, generator=generator, device=generator.device) for _ in range(2))
        times = torch.rand((2, batch), generator=generator, device=generator.device)
        return z, velocity, times.amax(0), times.amin(0), *(dict(model.named_parameters())[name] for name in names)

    def loss(u: Tensor, dudt: Tensor, velocity: Tensor, t: Tensor, r: Tensor) -> Inputs:
        return (squared_error(u, dudt, velocity, t, r).mean(),)  # type: ignore[union-attr]

    y = torch.arange(batch, device=setting.device) % 10

    def apart(inputs: Inputs) -> Inputs:
        z, velocity, t, r, *_ = inputs
        u = model(z, torch.stack((t, r), 1), y)
        return loss(u, total_derivative(model, z, velocity, t, r, y), velocity, t, r)  # type: ignore[arg-type]

    def together(inputs: Inputs) -> Inputs:
        z, velocity, t, r, *_ = inputs
        tangents = (velocity, torch.ones_like(t), torch.zeros_like(r))
        u, dudt = torch.func.jvp(lambda z, t, r: model(z, torch.stack((t, r), 1), y), (z, t, r), tangents)  # type: ignore[misc]
        return loss(u, dudt.detach(), velocity, t, r)

    weights = sum(dict(model.named_parameters())[name].nbytes for name in names)
    once = model.flops_per_sample() * batch
    shape = {"batch": batch, "tokens": model.num_tokens, "width": model.hidden_size, "blocks": model.depth}
    sides = Side(TOGETHER, together), Side(APART, apart)
    work = Work(weights, 3 * once), Work(2 * weights, 2 * once)
    name = f"{model.config.name.removeprefix('SiT-')} b{batch} fp32"
    return [Case(name, "fp32", shape, inputs, sides, *work, (1e-4, 1e-3))]


BENCHMARK = Benchmark(
    "mean_flow", ("tests/objectives/test_mean_flow.py", "tests/parity/test_published_mean_flow.py"), _cases
)
