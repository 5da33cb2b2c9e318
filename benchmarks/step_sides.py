"""What is compared in `step`: trainers of three habits on plain torch, and ours as its configuration says.

Built when first asked for, since each holds weights, moments, an EMA and gradients of its own; sides with the same
configuration share one engine.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from dit_fast.backend import force
from dit_fast.benchmarks.baselines.published_diversity import vectorised_diversity_loss
from dit_fast.benchmarks.baselines.published_step import CarefulDiversity, Float16Loss, PlainTrainer, PublishedDiversity
from dit_fast.benchmarks.cost import peak_memory
from dit_fast.methods.diversedit import DiverseDiT
from dit_fast.models import new_model
from dit_fast.objectives import Flow
from dit_fast.ops import diversity_loss
from dit_fast.runs import OptimizerConfig, TrainConfig, changed
from dit_fast.train.engine import SingleEngine
from dit_fast.train.loss import TrainingLoss
from dit_fast.world import World

PUBLISHED, PUBLISHED_FP16, CAREFUL, BENCH = "as published", "as published, fp16", "careful", "diffusion-bench"
OURS, WITHOUT = "dit_fast, all pairs", "dit_fast, no diversity loss"
ALONE = "diversity loss alone"
VARIANTS = {  # of OURS, by configuration
    "dit_fast, all pairs, bf16 stream": ("model.residual_dtype=bf16",),
    "dit_fast, all pairs, CUDA graph": ("engine.cuda_graph=true",),
    "dit_fast, all pairs, bf16 stream, CUDA graph": ("model.residual_dtype=bf16", "engine.cuda_graph=true"),
    "dit_fast, all pairs, compiled blocks": ("engine.compile=true",),
    "dit_fast, no diversity loss, CUDA graph": ("engine.cuda_graph=true",),
}
BF16_STREAM, GRAPH, BOTH, COMPILED, WITHOUT_GRAPH = VARIANTS
GROUPS = {  # measured in turn, the first one the baseline
    "plain": (PUBLISHED, OURS, WITHOUT, ALONE),
    "types": (PUBLISHED, PUBLISHED_FP16, OURS, BF16_STREAM),
    "graph": (OURS, GRAPH, BOTH),
    "compiled": (CAREFUL, OURS, COMPILED),
    "diffusion-bench": (BENCH, WITHOUT, WITHOUT_GRAPH),
}


@dataclass(frozen=True)
class StepCase:
    """input_size: of the latents [batch, channels, input_size, input_size], an eighth of the image's."""

    model: str
    batch: int
    precision: str
    input_size: int = 32
    channels: int = 4

    @property
    def name(self) -> str:
        size = "" if self.input_size == 32 else f" {8 * self.input_size}px"
        return f"{self.model.removeprefix('SiT-')} b{self.batch} {self.precision}{size}"


def batch_of(case: StepCase, device: torch.device, step: int) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(step)
    size = (case.batch, 2, case.channels, case.input_size, case.input_size)
    first = step * case.batch
    return {
        "moments": torch.randn(size, generator=generator, device=device),
        "label": torch.randint(0, 1000, (case.batch,), generator=generator, device=device),
        "position": torch.arange(first, first + case.batch, device=device),
    }


class Marks:
    """Seconds of the parts of one step: `__call__` where a part ends, on the device's clock."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._ends: list[tuple[str, Any]] = []
        self("start")

    def __call__(self, part: str) -> None:
        if not self._cuda:
            self._ends.append((part, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._ends.append((part, event))

    def seconds(self) -> dict[str, float]:
        if self._cuda:
            torch.cuda.synchronize()
        pairs = zip(self._ends, self._ends[1:], strict=False)
        return {
            part: before.elapsed_time(end) / 1e3 if self._cuda else end - before for (_, before), (part, end) in pairs
        }


class MarkedEngine(SingleEngine):
    """Says where forward, backward and the rest of a step end."""

    mark: Callable[[str], None] = staticmethod(lambda part: None)

    def _forward(self, batch: Any, step: int) -> Any:
        result = super()._forward(batch, step)
        self.mark("forward")
        return result

    def _backward(self, loss: Tensor, count: int) -> None:
        super()._backward(loss, count)
        self.mark("backward")


@dataclass
class Side:
    """run(number of the step): one whole step. owner: what has `mark`, None where a step has no parts to tell."""

    run: Callable[[int], Any]
    owner: Any = None

    @property
    def has_parts(self) -> bool:
        return self.owner is not None

    def first(self) -> None:
        """One step. Raises ArithmeticError unless all that it gives is finite: the update would be left out."""
        given = self.run(0)
        if not all(x.isfinite().all() for x in ([given] if isinstance(given, Tensor) else given)):
            raise ArithmeticError("the step gave NaN or infinity, which is no step to time")

    def peak(self, device: torch.device) -> int:
        """Bytes of memory beyond what it holds anyway."""
        return peak_memory(partial(self.run, 0), device)

    def parts(self, step: int, device: torch.device) -> dict[str, float]:
        """Seconds by part of one step."""
        marks = self.owner.mark = Marks(device)
        self.run(step)
        if isinstance(self.owner, MarkedEngine):
            marks("update")
        self.owner.mark = lambda part: None
        return marks.seconds()


class Sides:
    """Makes sides of one case. overrides: key=value for all of ours. small: a compiler that only traces."""

    def __init__(self, case: StepCase, device: torch.device, overrides: Sequence[str] = (), small: bool = False):
        changed(TrainConfig(), overrides)  # before anything is built
        self.case, self.device, self.overrides = case, device, tuple(overrides)
        self.compile = partial(torch.compile, dynamic=False, backend="eager" if small else "inductor")
        self._engines: dict[tuple[bool, tuple[str, ...]], MarkedEngine] = {}

    def make(self, name: str) -> Side:
        """Raises what its parts raise: ConfigError for a key that this version does not have."""
        if name in (PUBLISHED, PUBLISHED_FP16):
            kind = Float16Loss if name == PUBLISHED_FP16 else TrainingLoss
            return self._plain(PlainTrainer(self._published_loss(kind, PublishedDiversity), TrainConfig().optimizer))
        if name == CAREFUL:
            compiled = partial(CarefulDiversity, loss=self.compile(vectorised_diversity_loss))
            loss = self._published_loss(TrainingLoss, compiled)
            for block in loss.model.blocks:
                block.compile(dynamic=False, backend=self.compile.keywords["backend"])
            return self._plain(PlainTrainer(loss, TrainConfig().optimizer, fused=True, foreach=True))
        if name == BENCH:
            loss, habits = (
                self._published_loss(TrainingLoss),
                OptimizerConfig(beta2=0.95, ema_decay=0.9995, grad_clip=0.0),
            )
            return self._plain(PlainTrainer(loss, habits, fused=True, call=self.compile(loss)))
        if name == ALONE:
            features = self._features
            return Side(lambda step: torch.autograd.grad(diversity_loss(features, "all").total, features))
        diverse = not name.startswith(WITHOUT)
        if name == COMPILED:
            engine = self.engine(diverse, ())
            return Side(self._with_compiled_blocks(engine), engine)
        engine = self.engine(diverse, VARIANTS.get(name, ()))
        return Side(partial(self._step, engine), None if "CUDA graph" in name else engine)

    def engine(self, diverse: bool, assignments: Sequence[str]) -> MarkedEngine:
        key = diverse, (*assignments, *self.overrides)
        if key not in self._engines:
            config = self._config(*key[1])
            bind = [partial(DiverseDiT, DiverseDiT.Config(pairs="all"))] * diverse
            loss = self._loss(TrainingLoss, config, *bind)
            self._engines[key] = MarkedEngine(loss, config, World(0, 1, self.device))
        return self._engines[key]

    def _step(self, engine: MarkedEngine, step: int) -> Any:
        lr = engine.config.optimizer.lr
        return engine.train_step([batch_of(self.case, self.device, step)], step, lr).logs["loss"]

    def _plain(self, trainer: PlainTrainer) -> Side:
        def run(step: int) -> Tensor:
            with force("torch"):
                return trainer.train_step(batch_of(self.case, self.device, step), step)

        return Side(run, trainer)

    def _config(self, *assignments: str) -> TrainConfig:
        case = self.case
        own = [f"model.name={case.model}", "model.skip_wiring=input", f"engine.precision={case.precision}"]
        return changed(TrainConfig(), [*own, *assignments])

    def _published_loss(self, kind: type[TrainingLoss], *methods: Callable[[Any, Any], Any]) -> TrainingLoss:
        return self._loss(kind, self._config("model.residual_dtype=autocast"), *methods)

    def _loss(self, kind: type[TrainingLoss], config: TrainConfig, *methods: Callable[[Any, Any], Any]) -> TrainingLoss:
        """methods: bound by a call with the model and a data set, of which they need nothing."""
        torch.manual_seed(0)
        sizes = {"input_size": self.case.input_size, "in_channels": self.case.channels, "num_classes": 1000}
        with self.device:  # on a CPU the weights of XL/2 take ten seconds, for every side
            model = new_model(dataclasses.replace(config.model, **sizes))
        bound = [bind(model, None) for bind in methods]
        options: Any = {"seed": 0, "label_dropout": 0.1, "precision": config.engine.precision}
        return kind(model, Flow(Flow.Config(), model), bound, **options).to(self.device)

    @cached_property
    def _features(self) -> list[Tensor]:
        """Block outputs of our model, detached leaves, in the dtype in which the loss meets them in training."""
        loss, batch = self.engine(True, ()).loss, batch_of(self.case, self.device, 0)
        model: Any = loss.model
        times = torch.full((self.case.batch,), 0.5, device=self.device)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=loss.precision == "bf16"):
            _, features = model(batch["moments"][:, 0].contiguous(), times, batch["label"], taps=range(model.depth))
        return [feature.clone().requires_grad_() for feature in features.values()]

    @property
    def feature_dtype(self) -> str:
        return str(self._features[0].dtype).removeprefix("torch.")

    def _with_compiled_blocks(self, engine: MarkedEngine) -> Callable[[int], Any]:
        """The step with the model's blocks compiled as engine.compile does it; at other times they are as they were."""
        blocks: list[Any] = list(engine.model.blocks)
        for block in blocks:
            block.compile(backend=self.compile.keywords["backend"])
        compiled = [block._compiled_call_impl for block in blocks]

        def switch(calls: Sequence[Any]) -> None:
            for block, call in zip(blocks, calls, strict=True):
                block._compiled_call_impl = call

        def run(number: int) -> Any:
            switch(compiled)
            try:
                return self._step(engine, number)
            finally:
                switch([None] * len(blocks))

        switch([None] * len(blocks))
        return run
