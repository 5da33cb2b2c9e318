"""The whole training step of DiverseDiT: model, flow matching, diversity loss, clipping, AdamW with EMA.

Sides in one process: the step as published (our model through the plain torch reference of every op), ours with all
pairs, the same with compiled blocks (CUDA), ours without the diversity loss, and the diversity loss alone on the
features of that very model. Data are random latents that lie on the device already.
"""

import time
from collections.abc import Callable, Sequence
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
from dit_fast.benchmarks.measure import SAMPLES, part_entry, reason
from dit_fast.benchmarks.timing import Call, clock_for, interleave, summarise
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
COMPILED = "dit_fast, all pairs, compiled blocks"
ALONE = "diversity loss alone"
OPTIMIZER_BYTES = 40  # per parameter: gradient read twice, weight, two moments and EMA read and written, all float32


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
    """The case as it stands in the JSON, parts "step" (with samples per second, MFU and the host's time) and
    "diversity_loss". A side that raises is left out with the reason, unless it is the first."""
    device, end = setting.device, time.perf_counter() + seconds
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
    if device.type == "cuda":
        steps[COMPILED] = _with_compiled_blocks(ours.model, steps[OURS])
    features = _features(ours.loss, _batch(case, device, 0))
    steps[ALONE] = lambda step: torch.autograd.grad(diversity_loss(features, "all").total, features)
    costs: dict[str, dict[str, int]] = {}
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name, run in steps.items():
        try:
            run(0)  # a compiler's memory is not the step's
            costs[name] = {"peak_memory_bytes": peak_memory(partial(run, 0), device)}
            if device.type == "cuda":  # elsewhere the count would be of counters that lie on the CPU anyway
                costs[name]["host_waits"] = host_waits(partial(run, 0), device)
        except Exception as error:
            if name == PUBLISHED:
                raise
            (skipped if name == COMPILED else failed)[name] = reason(error)
    host: dict[str, list[float]] = {name: [] for name in costs}
    calls = {name: _timed(steps[name], host[name]) for name in costs}
    warm_up = 3 if device.type == "cuda" else 1
    left = end - time.perf_counter()
    rounds = interleave(calls, clock_for(device), samples=SAMPLES, seconds=left, warm_up=warm_up)
    samples = {name: [times[0] for times in turns] for name, turns in rounds.items()}
    alone = {name: samples.pop(name) for name in (ALONE,) if name in samples}
    model: Any = ours.loss.model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    work = Work(OPTIMIZER_BYTES * trained, 3 * model.flops_per_sample() * case.batch)
    step = part_entry(samples, dict.fromkeys(samples, work), ceilings, case.precision)
    for name, side in step["sides"].items():
        side["host_s"] = summarise(host[name][warm_up:]).median
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
        "skipped": skipped,
        "failed": failed,
        "costs": costs,
        "parts": {"step": step}
        | ({"diversity_loss": part_entry(alone, {ALONE: least}, ceilings, case.precision)} if alone else {}),
    }


def _with_compiled_blocks(model: Any, step: Callable[[int], Any]) -> Callable[[int], Any]:
    """The step with the model's blocks compiled as engine.compile does it; at other times they are as they were."""
    blocks = list(model.blocks)
    for block in blocks:
        block.compile()
    compiled = [block._compiled_call_impl for block in blocks]

    def switch(calls: Sequence[Any]) -> None:
        for block, call in zip(blocks, calls, strict=True):
            block._compiled_call_impl = call

    def run(number: int) -> Any:
        switch(compiled)
        try:
            return step(number)
        finally:
            switch([None] * len(blocks))

    switch([None] * len(blocks))
    return run


def diversity_share(cases: list[dict[str, Any]], case: str) -> float | None:
    """Time of the diversity loss alone over that of our step with it, in percent."""
    for entry in cases:
        sides = {name: side for part in entry["parts"].values() for name, side in part["sides"].items()}
        if entry["name"] == case and ALONE in sides and OURS in sides:
            return 100 * sides[ALONE]["median_s"] / sides[OURS]["median_s"]
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


def our_step(case: StepCase, device: torch.device) -> Callable[[int], Any]:
    """Our whole step, all pairs, as a function of its number."""
    bind = partial(DiverseDiT, DiverseDiT.Config(pairs="all"))
    engine = SingleEngine(_training_loss(case, device, bind), TrainConfig(), World(0, 1, device))
    return lambda step: engine.train_step([_batch(case, device, step)], step, TrainConfig().optimizer.lr).logs


def _features(training_loss: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Block outputs of the model, detached leaves, in the dtype in which the loss meets them in training."""
    size, model = batch["label"].shape[0], training_loss.model
    x = batch["moments"][:, 0].contiguous()
    times = torch.full((size,), 0.5, device=x.device)
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=training_loss.precision == "bf16"):
        _, features = model(x, times, batch["label"], taps=range(model.depth))
    return [feature.clone().requires_grad_() for feature in features.values()]


def _timed(run: Callable[[int], Any], host: list[float]) -> Call:
    """host gets the seconds of each call, until it returns."""

    def call(number: int, mark: Callable[[], None]) -> Any:
        start = time.perf_counter()
        kept = run(number)
        host.append(time.perf_counter() - start)
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
