"""The whole training step of DiverseDiT: model, flow matching, diversity loss, clipping, AdamW with EMA.

Sides in one process: the step as published (our model through the plain torch reference of every op), ours with all
pairs, ours without the diversity loss, and the diversity loss alone on the features of that very model. Data are random
latents that lie on the device already.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_fast.backend import force
from dit_fast.benchmarks.baselines.published_step import PublishedDiversity, PublishedTrainer
from dit_fast.benchmarks.cases.case import Benchmark, Setting, Target, Work
from dit_fast.benchmarks.ceilings import Ceilings
from dit_fast.benchmarks.cost import host_waits, peak_memory
from dit_fast.benchmarks.measure import SAMPLES, part_entry
from dit_fast.benchmarks.timing import Call, clock_for, interleave
from dit_fast.methods import Method
from dit_fast.methods.diversedit import DiverseDiT
from dit_fast.models import build_model
from dit_fast.objectives import Flow
from dit_fast.ops import diversity_loss
from dit_fast.runs import TrainConfig
from dit_fast.train.engine import SingleEngine
from dit_fast.train.loss import TrainingLoss
from dit_fast.world import World

PUBLISHED, OURS, WITHOUT = "as published", "dit_fast, all pairs", "dit_fast, no diversity loss"
ALONE = "diversity loss alone"
OPTIMIZER_BYTES = 36  # per parameter: weight, two moments and EMA read and written, gradient read, all float32


@dataclass(frozen=True)
class StepCase:
    """input_size: of the latents [batch, channels, input_size, input_size]."""

    model: str
    batch: int
    precision: str
    input_size: int = 32
    channels: int = 4

    @property
    def name(self) -> str:
        return f"{self.model.removeprefix('SiT-')} b{self.batch} {self.precision}"


def step_cases(setting: Setting) -> list[StepCase]:
    if setting.small:
        return [StepCase("SiT-Nano/2", 2, "fp32", input_size=8)]
    if setting.device.type != "cuda":
        return [StepCase("SiT-Nano/2", 32, "fp32", input_size=16)]
    return [StepCase("SiT-XL/2", 32, "bf16"), StepCase("SiT-B/2", 32, "bf16"), StepCase("SiT-B/2", 256, "bf16")]


def measure_step(case: StepCase, setting: Setting, ceilings: Ceilings, seconds: float) -> dict[str, Any]:
    """The case as it stands in the JSON, parts "step" (with samples per second and MFU) and "diversity_loss"."""
    device = setting.device
    published = PublishedTrainer(_training_loss(case, device, PublishedDiversity), TrainConfig().optimizer)
    world = World(0, 1, device)
    ours, without = (
        SingleEngine(_training_loss(case, device, *methods), TrainConfig(), world)
        for methods in ([partial(DiverseDiT, DiverseDiT.Config(pairs="all"))], [])
    )
    lr = TrainConfig().optimizer.lr

    def as_published(step: int) -> Any:
        with force("torch"):
            return published.train_step(_batch(case, device, step), step)

    steps: dict[str, Callable[[int], Any]] = {
        PUBLISHED: as_published,
        OURS: lambda step: ours.train_step([_batch(case, device, step)], step, lr).logs,
        WITHOUT: lambda step: without.train_step([_batch(case, device, step)], step, lr).logs,
    }
    features = _features(ours.loss, _batch(case, device, 0))
    steps[ALONE] = lambda step: torch.autograd.grad(diversity_loss(features, "all").total, features)
    costs = {name: {"peak_memory_bytes": peak_memory(partial(run, 0), device)} for name, run in steps.items()}
    if device.type == "cuda":  # elsewhere the count would be of counters that lie on the CPU anyway
        for name, run in steps.items():
            costs[name]["host_waits"] = host_waits(partial(run, 0), device)
    calls = {name: _timed(run) for name, run in steps.items()}
    warm_up = 3 if device.type == "cuda" else 1
    rounds = interleave(calls, clock_for(device), samples=SAMPLES, seconds=seconds, warm_up=warm_up)
    samples = {name: [times[0] for times in turns] for name, turns in rounds.items()}
    alone = {ALONE: samples.pop(ALONE)}
    model: Any = ours.loss.model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    work = Work(OPTIMIZER_BYTES * trained, 3 * model.flops_per_sample() * case.batch)
    step = part_entry(samples, dict.fromkeys(samples, work), ceilings, case.precision)
    for side in step["sides"].values():
        side["samples_per_s"] = case.batch / side["median_s"]
        side["mfu"] = side["flops_per_s"] / ceilings.matmul[case.precision]
    elements, pairs = sum(x.numel() for x in features), len(features) * (len(features) - 1) // 2
    least = Work(3 * sum(x.nbytes for x in features), 18 * elements + 6 * pairs * features[0].numel())
    return {
        "name": case.name,
        "dtype": case.precision,
        "shape": {
            "batch": case.batch,
            "tokens": model.num_tokens,
            "width": model.hidden_size,
            "blocks": model.depth,
            "parameters": trained,
        },
        "baseline": PUBLISHED,
        "feature_dtype": str(features[0].dtype).removeprefix("torch."),
        "costs": costs,
        "parts": {"step": step, "diversity_loss": part_entry(alone, {ALONE: least}, ceilings, case.precision)},
    }


def diversity_share(cases: list[dict[str, Any]], case: str) -> float | None:
    """Time of the diversity loss alone over that of our step with it, in percent."""
    for entry in cases:
        if entry["name"] == case:
            alone = entry["parts"]["diversity_loss"]["sides"][ALONE]["median_s"]
            return 100 * alone / entry["parts"]["step"]["sides"][OURS]["median_s"]
    return None


def _training_loss(case: StepCase, device: torch.device, *methods: Callable[[Any, Any], Method]) -> TrainingLoss:
    """methods: bound by a call with the model and a data set, of which they need nothing."""
    torch.manual_seed(0)
    model = build_model(case.model, input_size=case.input_size, in_channels=case.channels, skip_wiring="input")
    precision: Any = case.precision
    return TrainingLoss(
        model,
        Flow(Flow.Config(), model),
        [bind(model, None) for bind in methods],
        seed=0,
        label_dropout=0.1,
        precision=precision,
    ).to(device)


def _batch(case: StepCase, device: torch.device, step: int) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(step)
    size = (case.batch, 2, case.channels, case.input_size, case.input_size)
    first = step * case.batch
    return {
        "moments": torch.randn(size, generator=generator, device=device),
        "label": torch.randint(0, 1000, (case.batch,), generator=generator, device=device),
        "position": torch.arange(first, first + case.batch, device=device),
    }


def _features(training_loss: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Block outputs of the model, detached leaves, in the dtype in which the loss meets them in training."""
    size, model = batch["label"].shape[0], training_loss.model
    x = batch["moments"][:, 0].contiguous()
    times = torch.full((size,), 0.5, device=x.device)
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=training_loss.precision == "bf16"):
        _, features = model(x, times, batch["label"], taps=range(model.depth))
    return [feature.clone().requires_grad_() for feature in features.values()]


def _timed(run: Callable[[int], Any]) -> Call:
    def call(number: int, mark: Callable[[], None]) -> Any:
        kept = run(number)
        mark()
        return kept

    return call


BENCHMARK: Benchmark[StepCase] = Benchmark(
    "step",
    ("tests/ops/test_diversity*.py", "tests/ops/test_adaln*.py", "tests/ops/test_long_skip*.py",
     "tests/methods/test_diversedit.py", "tests/models/test_training_curve.py", "tests/train/test_optim.py",
     "tests/train/test_loss.py"),
    step_cases,
    {
        "cuda": (
            Target("XL/2 b32: diversity loss, all pairs, under 1 % of the step (percent)", 1,
                   lambda cases, _: diversity_share(cases, "XL/2 b32 bf16"), at_most=True),
        )
    },
)  # fmt: skip
