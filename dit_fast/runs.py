"""The configuration of a training run: one `TrainConfig`, what each key means and may be, and how it is read.

A component that a run chooses by name (a method) has its `Config` beside it; the groups here are of those above this
floor. Values pass through pydantic, strictly: nothing is rounded, nothing is taken for something else. What a run has
stored passed through it when the run was started, and is read without it.
"""

import functools
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from dit_fast.diffusion.solvers import SolverName
from dit_fast.errors import ConfigError
from dit_fast.methods import METHODS
from dit_fast.models.recompute import ActivationCheckpointing
from dit_fast.models.registry import BACKBONES, kind
from dit_fast.models.sit import SiT
from dit_fast.objectives import OBJECTIVES, Flow
from dit_fast.options import assign, chosen, diff, from_dict, groups, keys, leaves, setting, shown, to_dict


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Latent shards and how they are read."""

    path: str = setting("", "Folder (or address: http(s)://, s3://, gs://) that holds dataset.json", resumes=True)
    reader: Literal["auto", "indexed", "stream"] = setting(
        "auto",
        "indexed: shards where they lie; stream: copies in data.cache; auto: by the path; the order is the same",
        resumes=True,
    )
    seed: int | None = setting(None, "Key of the order of the samples; none = run.seed", "[0, 2^64)")
    shuffle_group: int = setting(64, "Shards shuffled together; 0 = all of them (exact shuffle)", "[0, 1e6]")
    num_workers: int = setting(2, "Threads of each rank that read ahead; 0 = none", "[0, 256]", resumes=True)
    cache: str = setting("", "Folder for copies of streamed shards; none = one in the temporary folder", resumes=True)
    cache_gib: float = setting(64.0, "Most GiB of such copies; the oldest make room", "[0.001, 1e6]", resumes=True)
    check_crc: bool = setting(True, "Check every sample against its checksum", resumes=True)
    strict: bool = setting(False, "End at the first bad sample, instead of taking another in its place", resumes=True)
    max_bad_share: float = setting(1e-3, "Share of bad samples above which training ends", "[0, 1]", resumes=True)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer by name; the exponential moving average of the weights is one of its states."""

    name: Literal["adamw", "torch_adamw", "torch_fused_adamw", "deepspeed_fused_adam", "apex_fused_adam"] = setting(
        "adamw", "AdamW: ours (multi-tensor, with the average in the same pass) or another's", resumes=True
    )
    lr: float = setting(1e-4, "Learning rate after the warm-up", "[0, 1e30]")
    beta1: float = setting(0.9, "Decay of the first moment", "[0, 1)")
    beta2: float = setting(0.999, "Decay of the second moment", "[0, 1)")
    eps: float = setting(1e-8, "Added to the root of the second moment; float32 divides by zero below", "[1e-30, 1]")
    weight_decay: float = setting(0.0, "Decoupled weight decay", "[0, 1e4]")
    warmup_steps: int = setting(0, "Steps of linear growth from 0 to lr; constant afterwards", "[0, 1e9]")
    grad_clip: float = setting(1.0, "Largest global L2 norm of the gradient; 0 = off", "[0, 1e30]")
    ema_decay: float = setting(0.9999, "Decay of the moving average of the weights", "[0, 1)")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step is run: batch sizes, precision, ZeRO stage."""

    name: Literal["deepspeed", "ddp"] = setting(
        "deepspeed",
        "What ranks share a step by: DeepSpeed's ZeRO, or torch's DDP with all on each; one process needs neither",
        resumes=True,
    )
    zero_stage: Literal[0, 1, 2, 3] = setting(1, "What DeepSpeed shards over ranks", resumes=True)
    precision: Literal["fp32", "bf16"] = setting(
        "bf16", "bf16: autocast in the forward; weights and optimizer states stay float32"
    )
    global_batch: int = setting(256, "Samples per step, over all ranks", "[1, 1e7]")
    micro_batch: int = setting(
        0, "Samples per rank and backward pass; 0 = global_batch / ranks", "[0, 1e7]", resumes=True
    )
    # off: gradients are used before they are reduced, in silence (DeepSpeed issues 8061, 8080, 7965, 7898)
    overlap_comm: bool = setting(
        False,
        "DeepSpeed: reduce gradients during the backward pass (DDP always does); not in stage 1, where it is wrong",
        resumes=True,
    )
    reduce_bucket_size: int = setting(500_000_000, "Elements that DeepSpeed reduces at once", "[1, 1e12]", resumes=True)
    allgather_bucket_size: int = setting(
        500_000_000, "Elements that DeepSpeed gathers at once", "[1, 1e12]", resumes=True
    )
    timeout: int = setting(
        1800,
        "Seconds without progress after which ranks name who is missing and end with status 75",
        "[5, 1e6]",
        resumes=True,
    )
    communication_dtype: Literal["fp32", "bf16"] = setting("fp32", "Type in which gradients are reduced")
    activation_checkpointing: ActivationCheckpointing = setting(
        "none",
        "Computed again by the backward, for memory; gelu: it; selective: all but products and attention; full: blocks",
        resumes=True,
    )
    compile: bool = setting(False, "torch.compile for every block", resumes=True)
    cuda_graph: bool = setting(
        False, "Replay the step as one CUDA graph; one process, optimizer.name=adamw", resumes=True
    )
    deterministic: bool = setting(
        False, "Equal bits on a GPU at every length and precision: torch.use_deterministic_algorithms", resumes=True
    )


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Sample grids drawn while training, from the averaged weights."""

    every: int = setting(10_000, "Steps between grids; 0 = never", "[0, 1e9]", resumes=True)
    count: int = setting(16, "Images in a grid", "[1, 10000]", resumes=True)
    # as the published trainers preview (REPA), a quick look; what is drawn afterwards has the defaults of SampleOptions
    num_steps: int = setting(50, "Sampling steps", "[1, 10000]", resumes=True)
    sampler: SolverName = setting("euler", "Sampler", resumes=True)
    cfg_scale: float = setting(4.0, "Classifier-free guidance; 1 = off", "[0, 1000]", resumes=True)
    omega: float | None = setting(
        None, "Guidance that the model is told; none = 2.5, where it is told any", "(0, 1000]", resumes=True
    )
    t_min: float | None = setting(None, "Tell it guidance for t from here; none = 0", "[0, 1]", resumes=True)
    t_max: float | None = setting(None, "Tell it guidance for t to here; none = 1", "[0, 1]", resumes=True)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Numbers of images drawn while training, from the averaged weights; RUN/evaluations.jsonl has them."""

    every: int = setting(0, "Steps between evaluations; 0 = never", "[0, 1e9]", resumes=True)
    network: str = setting(
        "efficientnet-lite0", "Whose features: adm:FILE, torch-fidelity:FILE or an encoder", resumes=True
    )
    reference: str = setting("", "As `dit-fast evaluate --reference`; empty = the run's data set", resumes=True)
    count: int = setting(5000, "Images", "[2, 1e6]", resumes=True)
    labels: Literal["balanced", "random"] = setting("balanced", "How labels are chosen", resumes=True)
    num_steps: int = setting(50, "Sampling steps", "[1, 10000]", resumes=True)
    sampler: SolverName | None = setting(
        None, "Sampler; none = heun, mean_flow for a mean velocity, ddpm for DDPM", resumes=True
    )
    cfg_scale: float = setting(
        1.0, "Classifier-free guidance; 1 = off, as curves are compared", "[0, 1000]", resumes=True
    )
    batch: int = setting(64, "Images computed together", "[1, 65536]", resumes=True)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run folder, its length and what is kept."""

    dir: str = setting("", "Run folder; starting the same command again resumes it", resumes=True)
    steps: int = setting(400_000, "Optimizer steps of the whole run", "[1, 1e9]", resumes=True)
    seed: int = setting(0, "Key of the initial weights and previews, and of all else that has no key", "[0, 2^64)")
    noise_seed: int | None = setting(
        None, "Key of what each step draws: posterior, noise, times, dropped labels; none = run.seed", "[0, 2^64)"
    )
    log_every: int = setting(50, "Steps between rows of metrics.jsonl", "[1, 1e9]", resumes=True)
    checkpoint_every: int = setting(10_000, "Steps between checkpoints; 0 = only at the end", "[0, 1e9]", resumes=True)
    async_checkpoint: bool = setting(
        True, "Checkpoints are copied to host memory, and written while training goes on", resumes=True
    )
    keep_checkpoints: int = setting(3, "Newest checkpoints kept; 0 = all", "[0, 1e9]", resumes=True)
    keep_every: int = setting(
        0, "Checkpoints of multiples of this are kept for ever; 0 = none", "[0, 1e9]", resumes=True
    )
    tensorboard: bool = setting(True, "Also write TensorBoard files, if it is installed", resumes=True)
    max_rollbacks: int = setting(
        3, "Times that a diverged run goes back to a checkpoint and leaves out the samples since; 0 = never",
        "[0, 1000]", resumes=True,
    )  # fmt: skip
    loss_spike: float = setting(
        0.0, "Robust z-score, over 200 steps, of a loss that counts as diverged; 0 = off", "[0, 1e6]", resumes=True
    )
    grad_spike: float = setting(
        0.0, "The same of the gradient's norm before clipping", "[0, 1e6]", resumes=True
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run."""

    model: Any = chosen(BACKBONES, SiT.Config(), kind)
    data: DataConfig = DataConfig()
    objective: Any = chosen(OBJECTIVES, Flow.Config())
    methods: tuple[Any, ...] = chosen(METHODS, ())
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    preview: PreviewConfig = PreviewConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunConfig = RunConfig()

    @property
    def data_seed(self) -> int:
        """Of the order of the samples."""
        return self.run.seed if self.data.seed is None else self.data.seed

    @property
    def noise_seed(self) -> int:
        """Of everything that is drawn within a step."""
        return self.run.seed if self.run.noise_seed is None else self.run.noise_seed


SEEDS = ("run.seed", "data.seed", "run.noise_seed")  # of initial weights, the order of the samples, a step's draws
RECOMPUTE = "model.checkpoint_blocks"
# groups of keys, and keys, by their former names
MOVED = {"flow": "objective", RECOMPUTE: "engine.activation_checkpointing"}


def checked(config: TrainConfig) -> TrainConfig:
    """An equal configuration that went through every check. Raises ConfigError for the first that fails."""
    return from_dict(TrainConfig, to_dict(config), _checked)


def changed(config: TrainConfig, assignments: Sequence[str]) -> TrainConfig:
    """A checked copy with `key=value` assignments applied (`options.assign`).

    Raises ConfigError naming the key, the nearest valid key, or the value and what was expected.
    """
    _refuse_moved(assignment.partition("=")[0].strip() for assignment in assignments)
    return from_dict(TrainConfig, assign(config, assignments), _checked)


def read_config(path: Path) -> TrainConfig:
    """The configuration in a JSON file. Raises ConfigError for what cannot be read and for wrong keys and values.

    Only in the folder of a run, as the run has written it, may keys have former names.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text, parse_float=Decimal, parse_constant=_no_constant, object_pairs_hook=_no_repetition)
        if path.name == "config.json" and path.with_name("metrics.jsonl").exists():
            values = _renamed(values)
        if isinstance(values, Mapping):
            _refuse_moved(path for path, _ in leaves(values))
        return from_dict(TrainConfig, values, _checked)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this configuration: {error.strerror}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a JSON configuration: {error}") from None


def stored(values: Any) -> TrainConfig:
    """The configuration that a run has stored; a key that is newer than the run has its default.

    Raises ConfigError for an unknown key or name and for a value of another type.
    """
    return from_dict(TrainConfig, _renamed(values))


def forbidden_changes(old: TrainConfig, new: TrainConfig) -> list[str]:
    """The differences ("key: old -> new") between two configurations that a resumed run may not have.

    Where and how a run is done may change, what it computes may not. Micro-batch and ranks may, because elastic
    restarts need it, although statistics over a rank's micro-batch change with them.
    """
    free = {key.path for path, group in groups(TrainConfig) for key in keys(group, path) if key.resumes}
    return [line for line in diff(to_dict(old), to_dict(new)) if line.partition(": ")[0] not in free]


def _renamed(values: Any) -> Any:
    if not isinstance(values, Mapping):
        return values
    values = {MOVED.get(key, key): value for key, value in values.items()}
    group, _, key = RECOMPUTE.partition(".")
    if isinstance(values.get(group), Mapping) and key in values[group]:
        rest, engine = dict(values[group]), values.get("engine", {})
        which = "full" if rest.pop(key) else "none"
        values |= {group: rest, "engine": {"activation_checkpointing": which, **engine}}
    return values


def _refuse_moved(paths: Iterable[str]) -> None:
    for path in paths:
        for former in (path, path.partition(".")[0]):
            if former in MOVED:
                raise ConfigError(f"'{path}' is now '{MOVED[former]}{path.removeprefix(former)}'")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _no_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} stands twice in one group")
    return dict(pairs)


@functools.cache
def _adapters(group: type) -> dict[str, Any]:
    """What checks each setting of a group."""
    try:
        from pydantic import Field, TypeAdapter
    except ImportError:
        raise ConfigError("checking a configuration needs pydantic; run `pip install 'dit_fast[train]'`") from None
    hints: dict[str, Any] = typing.get_type_hints(group)
    bounds = {item.name: Field(**_bounds(item.metadata.get("within", ""))) for item in fields(group)}
    bounded: dict[str, Any] = {name: Annotated[hints[name], bound] for name, bound in bounds.items()}
    return {name: TypeAdapter(hint) for name, hint in bounded.items()}


def _bounds(within: str) -> dict[str, Any]:
    """An interval such as "[0, 1)" as pydantic takes it; no bounds for ""."""
    if not within:
        return {}
    low, high = (2 ** int(text[2:]) if text.startswith("2^") else float(text) for text in within[1:-1].split(", "))
    return {{"[": "ge", "(": "gt"}[within[0]]: low, {"]": "le", ")": "lt"}[within[-1]]: high}


def _checked(group: type, values: Mapping[str, Any], path: str) -> Any:
    """A group whose values, text or JSON's, were converted and checked; `build` of `options.from_dict`."""
    adapters, hints = _adapters(group), typing.get_type_hints(group)
    arguments = {}
    for name, value in values.items():
        plain = _plain(value, hints[name])
        try:
            arguments[name] = adapters[name].validate_python(plain, strict=True)
        except ValueError as error:
            first: Any = error
            key = next(key for key in keys(group, path) if key.path == f"{path}.{name}")
            if first.errors()[0]["type"].startswith(("greater", "less")):
                raise ConfigError(f"{key.path}={shown(plain)[1:-1]} must lie in {key.within}") from None
            kind = "one of" if typing.get_origin(hints[name]) is Literal else "of type"
            raise ConfigError(f"'{key.path}' must be {kind} {key.type}, not {shown(value)}") from None
    return group(**arguments)


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,6})?", re.ASCII)
_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_NOTHING: Any = object()  # no setting takes it


def _plain(value: Any, hint: Any) -> Any:
    """The plain value of the annotated type that text or a JSON number stands for; else what pydantic will refuse."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        absent = value is None or (isinstance(value, str) and value.lower() == "none")
        return None if absent else _plain(value, next(kind for kind in arguments if kind is not type(None)))
    if origin is tuple:
        if isinstance(value, str):
            value = [] if value.strip().lower() in ("", "none") else value.split(",")
        return tuple(_plain(item, arguments[0]) for item in value) if isinstance(value, list | tuple) else _NOTHING
    kind = type(arguments[0]) if origin is Literal else hint
    if kind is bool:
        return _BOOLS.get(value.lower(), _NOTHING) if isinstance(value, str) else value
    if kind is str:
        return _NOTHING if isinstance(value, str) and "\0" in value else value
    if isinstance(value, bool):
        return _NOTHING  # True == 1
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = Decimal(value)
    if not isinstance(value, Decimal):
        return value
    if kind is float:
        number = float(value)
        return number if number or not value else _NOTHING  # too small to be told from 0
    whole = value.adjusted() <= 40 and value == value.to_integral_value()  # 10^6 digits are no number of anything
    return int(value) if whole else _NOTHING
