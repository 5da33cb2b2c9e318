"""How much memory of a device a run takes, and the largest micro-batch that fits: `dit-fast train RECIPE --plan GIB`.

Weights, gradients and optimizer states are counted by ZeRO stage and ranks. Activations are those of a whole step of
the run's own loss, forward and backward, on tensors without values (FakeTensor) with the implementations that a CUDA
device would have; each storage counts from the operation that makes it to its release. Nothing is measured: CUDA's
context, work space inside of kernels and the allocator's fragments are left out.
"""

import copy
import dataclasses
import functools
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_fast.backend import on_cuda
from dit_fast.data import DatasetInfo, open_dataset
from dit_fast.data.field import Field
from dit_fast.errors import ConfigError
from dit_fast.methods import build_methods
from dit_fast.models import Backbone, new_model
from dit_fast.nn.linear import make_shadows
from dit_fast.nn.long_skip import foldable
from dit_fast.objectives import OBJECTIVES
from dit_fast.runs import EngineConfig, TrainConfig
from dit_fast.train.loss import TrainingLoss
from dit_fast.train.prepare import check_stage, fit_to_dataset, kind_of, micro_batch

BLOCK = 512  # bytes: what torch's allocator rounds up to
GATHERED = 10**9  # elements that DeepSpeed's stage 3 holds whole at once, by default
SPARE = 0.05  # share of a device that the largest micro-batch leaves, for what is not counted
FLOAT = 4  # bytes of every weight, gradient and state
ENCODER_WIDTH = 768  # DINOv2-B's


class OneMode(FakeTensorMode):
    """Copied with a model, it stays the one that all its tensors belong to."""

    def __deepcopy__(self, memo: object) -> "OneMode":
        return self


@functools.cache
def one_mode() -> OneMode:
    """One for all: tables that are made once and kept belong to it, too."""
    return OneMode()


class Live(TorchDispatchMode):
    """Bytes of the storages that operations within have made and that are alive: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.peak_but_gradients = self.gradients = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):  # of one that was there before, views may follow
                self._add(x.untyped_storage(), 0)
        made = op(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage(), BLOCK)
        return made

    def _add(self, storage: torch.UntypedStorage, block: int) -> None:
        key = storage._cdata
        if key not in self._alive:
            size = -(-storage.nbytes() // BLOCK) * block
            self._alive[key] = weakref.ref(storage, lambda _: self._released(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)
            self.peak_but_gradients = max(self.peak_but_gradients, self.now - self.gradients)

    def _released(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size

    def gradient(self, parameter: Tensor) -> None:
        """A hook: its gradient is there."""
        assert parameter.grad is not None
        self.gradients += -(-parameter.grad.nbytes // BLOCK) * BLOCK


@dataclass(frozen=True)
class Step:
    """Bytes of a step's own tensors at their peak, and at that of those that are no gradients."""

    whole: int
    but_gradients: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what they hold.

    copies: what is not trained, the weights' shadows among it. activations: what a step makes, and where `gradients` is
    0 those too.
    """

    weights: int
    moments: int
    average: int
    gradients: int
    buckets: int
    copies: int
    activations: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def assumed(config: TrainConfig, tokens: int) -> DatasetInfo:
    """A description of latents of the model's own sizes, with an encoder's fields for each of its tokens; no data."""
    model = config.model
    return DatasetInfo(
        num_samples=1,
        num_classes=model.num_classes,
        class_names=(),
        channels=model.in_channels,
        size=model.input_size,
        scale=1.0,
        shift=0.0,
        fields={
            "features": Field("features.npy", (tokens, ENCODER_WIDTH), "float32"),
            "class_token": Field("class_token.npy", (ENCODER_WIDTH,), "float32"),
        },
        dtype="float32",
        autoencoder="",
        autoencoder_identity="",
        autoencoder_config={},
        statistics=None,
        shards=(),
        fingerprint="",
        source="",
    )


class Planner:
    """A run's model and losses without values; the data set is as the model's sizes say where `info` is not given.

    ranks: processes, one device each; 1 is one process without DeepSpeed. Raises UserError for what the run refuses,
    and where a method reads weights whose sizes are known once they are read.
    """

    def __init__(self, config: TrainConfig, info: DatasetInfo | None = None, ranks: int = 1):
        micro_batch(config.engine, ranks)
        for method in config.methods:
            read = "vae" if hasattr(method, "vae") else "encoders" if getattr(method, "encoders", ()) else ""
            if read:
                raise ConfigError(f"--plan cannot count the weights of methods.{method.name}.{read}; leave it out")
        self.config, self.ranks = config, ranks
        self._steps: dict[int, Step] = {}
        taught: list[Backbone] = []

        def load(path: str, weights: str) -> tuple[Backbone, str]:
            taught.append(new_model(config.model).eval().requires_grad_(False))
            return taught[-1], ""

        with one_mode():
            model = new_model(config.model)
            model.activation_checkpointing = config.engine.activation_checkpointing
            objective = OBJECTIVES[config.objective.name](config.objective, model)
            self.info = info or assumed(config, model.num_tokens)
            methods = build_methods(config.methods, model, self.info)
            if ranks > 1:
                check_stage(config.engine, (objective, *methods))
            for method in methods:
                method.prepare(load)
            self.loss = TrainingLoss(
                model,
                objective,
                methods,
                seed=0,
                label_dropout=config.model.label_dropout,
                precision=config.engine.precision,
            )
            self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            ours = config.engine.precision == "bf16" and config.optimizer.name == "adamw"
            shadows = make_shadows(model, self.parameters) if ours else []
            folds = [parameters[2] for parameters in foldable(model, self.parameters)] if ours else []
        self.fields = tuple(dict.fromkeys(name for method in methods for name in method.fields))
        self.trained = sum(parameter.numel() for parameter in self.parameters)
        still = [x for x in (*model.parameters(), *model.buffers()) if not x.requires_grad]
        copied = [x for method in methods for x in method.tensors().values()]
        self.shadows = sum(shadow.nbytes for shadow, _ in shadows)
        self.shadows += sum(2 * weight.numel() + 8 * len(weight) for weight in folds)  # folded, with their row sums
        self.untrained = sum(x.nbytes for x in (*still, *copied, *(x for each in taught for x in each.parameters())))

    @property
    def copies(self) -> int:
        """Bytes of what is not trained; stage 3 holds no shadows and nothing folded."""
        return self.untrained + (self.shadows if self.stage != 3 else 0)

    @property
    def stage(self) -> int | str:
        """Of DeepSpeed, or "ddp"; 0 for one process."""
        engine = self.config.engine
        return 0 if self.ranks == 1 else "ddp" if engine.name == "ddp" else engine.zero_stage

    def over(self, engine: EngineConfig, ranks: int) -> "Planner":
        """The same run with other ranks, which traces nothing anew. Raises ConfigError where batches do not divide."""
        micro_batch(engine, ranks)
        made = copy.copy(self)
        made.config, made.ranks = dataclasses.replace(self.config, engine=engine), ranks
        return made

    def step(self, micro: int) -> Step:
        """Forward and backward of so many samples, by tracing them."""
        if micro not in self._steps:
            live = Live()
            hooks = [each.register_post_accumulate_grad_hook(live.gradient) for each in self.parameters]
            with one_mode(), on_cuda():
                batch = self._batch(micro)
                with live:
                    self.loss(batch, 0)[0].backward()
            for hook, parameter in zip(hooks, self.parameters, strict=True):
                hook.remove()
                parameter.grad = None
            self._steps[micro] = Step(live.peak, live.peak_but_gradients)
        return self._steps[micro]

    def _batch(self, micro: int) -> dict[str, Tensor]:
        info = self.info
        fields = {name: info.field(name) for name in self.fields}
        return {
            "moments": torch.zeros(micro, 1 + info.std, info.channels, info.size, info.size, dtype=torch.float32),
            "label": torch.zeros(micro, dtype=torch.int64),
            "position": torch.zeros(micro, dtype=torch.int64),
            **{name: torch.zeros(micro, *field.shape, dtype=field.batch_dtype) for name, field in fields.items()},
        }

    def memory(self, micro: int, adds_up: bool = False) -> Memory:
        """Of one device, with so many samples at a time. adds_up: gradients stay from one micro-batch to the next."""
        engine, step, whole = self.config.engine, self.step(micro), FLOAT * self.trained
        stage = self.stage
        if stage == "ddp":  # its buckets are the gradients; those of earlier micro-batches lie beside them
            buckets = 2 * whole if adds_up else whole
            made = max(step.but_gradients, whole)
            return Memory(whole, 2 * whole, whole, buckets, 0, self.copies, made)
        bucket = FLOAT * min(engine.reduce_bucket_size, self.trained) if self.ranks > 1 else 0
        if not stage:  # buckets, and what the optimizer works with, come when the activations have gone
            made = whole + step.but_gradients if adds_up else step.whole
            return Memory(whole, 2 * whole, whole, 0, 0, self.copies, max(made, whole + max(bucket, whole)))
        share = -(-whole // self.ranks)
        # DeepSpeed's optimizer has its share of the weights once more.
        weights = whole + share if stage != 3 else 2 * share + min(whole, FLOAT * GATHERED)
        gradients = whole if stage == 1 else share
        return Memory(weights, 2 * share, share, gradients, bucket, self.copies, step.but_gradients)

    def largest(self, limit: int, adds_up: bool = False) -> int:
        """The largest micro-batch whose memory is at most `limit` bytes; 0 where one sample is too many."""
        known: dict[int, int] = {}
        guess = 1
        while True:
            known[guess] = self.memory(guess, adds_up).total
            under = max((micro for micro, total in known.items() if total <= limit), default=0)
            over = min((micro for micro, total in known.items() if total > limit), default=None)
            if over == under + 1:
                return under
            if len(known) < 3:
                guess = (8, 16)[len(known) - 1]
                if over is not None and guess >= over:
                    guess = (under + over) // 2
                continue
            low, high = (under, over) if over is not None else sorted(known)[-2:]
            rise = (known[high] - known[low]) / (high - low)
            guess = low + int((limit - known[low]) / rise) if rise > 0 else high * 2
            guess = max(guess, under + 1) if over is None else min(max(guess, under + 1), over - 1)


def sized(config: TrainConfig) -> tuple[TrainConfig, DatasetInfo | None]:
    """The configuration with its model's sizes, and the data set if it is there. Raises ConfigError without either."""
    info = None
    if config.data.path and Path(config.data.path).exists():
        info = open_dataset(config.data.path).info
        config = fit_to_dataset(config, info)
    elif missing := next(
        (key for key in ("input_size", "in_channels", "num_classes") if not getattr(config.model, key)), None
    ):
        raise ConfigError(
            f"model.{missing} is not set, and there is no data at data.path={config.data.path}; set either"
        )
    return config, info


def report(config: TrainConfig, gib: float, ranks: int) -> str:
    """What `--plan GIB` prints. Raises UserError for what cannot run."""
    if gib <= 0 or ranks < 1:
        raise ConfigError(f"--plan {gib:g} --ranks {ranks}: give a device's memory in GiB and at least one rank")
    config, info = sized(config)
    planner, engine = Planner(config, info, ranks), config.engine
    share, limit = engine.global_batch // ranks, int(gib * (1 - SPARE) * 2**30)
    fits = planner.largest(limit)
    adds_up = fits < share
    if adds_up:
        fits = planner.largest(limit, adds_up)
    taken = max((n for n in range(1, min(fits, share) + 1) if share % n == 0), default=0)
    kind = f"{kind_of(engine)}, {ranks} ranks" if ranks > 1 else "one process"
    lines = [
        f"{config.model.name}, {planner.trained / 1e6:.1f} M parameters; {kind}, {engine.precision}, "
        f"activation_checkpointing={engine.activation_checkpointing}",
    ]
    if not fits:
        least = planner.memory(1, share > 1).total / 2**30
        lines.append(f"no micro-batch fits in {gib:g} GiB: one sample takes {least:.2f}")
        return "\n".join(lines)
    memory = planner.memory(taken, adds_up)
    lines.append(f"GiB on each device, with engine.micro_batch={taken} of {share} samples in a step of a rank:")
    for name, size in dataclasses.asdict(memory).items():
        lines += [f"  {name:12}{size / 2**30:8.2f}"] if size else []
    lines.append(f"  {'total':12}{memory.total / 2**30:8.2f}")
    lines.append(
        f"the largest micro-batch in {gib:g} GiB is {fits}, with {SPARE:.0%} left for what is not counted: CUDA's"
    )
    lines.append("context, work space inside of kernels, the allocator's fragments. Counted by a trace, not measured.")
    return "\n".join(lines)
