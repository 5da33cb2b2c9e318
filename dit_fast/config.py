"""The configuration of a training run: one `TrainConfig`, its groups, and what each key means and may be.

Recipes (`dit_fast.recipes`) are functions that return one; the command line changes single fields by dotted path
(`optimizer.lr=2e-4`). The resolved configuration is written into the run folder and compared when the run is resumed.
`docs/configuration.md` is generated from this file: `python -m dit_fast.recipes > docs/configuration.md`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from dit_fast.options import setting


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer."""

    name: str = setting("SiT-XL/2", "Size and patch size: SiT-Nano/2 or SiT-{S, B, L, XL}/{2, 4, 8}")
    input_size: int = setting(0, "Latent height = width; 0 = as the data set says", "[0, 4096]")
    in_channels: int = setting(0, "Latent channels; 0 = as the data set says", "[0, 4096]")
    num_classes: int = setting(0, "Classes of the label table; 0 = as the data set says", "[0, 1e7]")
    skip_wiring: Literal["off", "input", "output"] = setting("input", "Long skips: none, as in the paper, as published")
    qk_norm: bool = setting(False, "Normalise queries and keys per head")
    label_dropout: float = setting(0.1, "Share of labels replaced by the null label", "[0, 1)")
    residual_dtype: Literal["fp32", "autocast"] = setting("fp32", "Type of the residual stream under bf16")
    attention: Literal["auto", "sdpa", "flash", "math"] = setting("auto", "Implementation of attention", resumes=True)
    checkpoint_blocks: bool = setting(False, "Recompute blocks in the backward pass to save memory", resumes=True)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Latent shards and how they are read."""

    path: str = setting("", "Folder (or http(s) address) that holds dataset.json", resumes=True)
    reader: Literal["auto", "indexed", "stream"] = setting(
        "auto", "indexed: local files; stream: WebDataset; auto: by the path; the order is the same", resumes=True
    )
    shuffle_group: int = setting(64, "Shards shuffled together; 0 = all of them (exact shuffle)", "[0, 1e6]")
    num_workers: int = setting(4, "Reading processes of each rank; 0 = none", "[0, 256]", resumes=True)
    check_crc: bool = setting(True, "Check every sample against its checksum", resumes=True)


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Path from data (t = 0) to noise (t = 1) and the distribution of t."""

    path: Literal["linear", "cosine"] = setting("linear", "Interpolation between latents and noise")
    time: Literal["uniform", "lognormal", "logit_normal"] = setting("uniform", "Distribution of t")
    time_mean: float = setting(0.0, "Mean before the sigmoid (logit_normal)", "[-100, 100]")
    time_std: float = setting(1.0, "Standard deviation before the sigmoid (logit_normal)", "(0, 100]")


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
        False, "Reduce gradients during the backward pass; not used in ZeRO stage 1, where it is wrong", resumes=True
    )
    reduce_bucket_size: int = setting(500_000_000, "Elements reduced at once", "[1, 1e12]", resumes=True)
    allgather_bucket_size: int = setting(500_000_000, "Elements gathered at once", "[1, 1e12]", resumes=True)
    communication_dtype: Literal["fp32", "bf16"] = setting("fp32", "Type in which gradients are reduced")
    compile: bool = setting(False, "torch.compile for every block", resumes=True)


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Sample grids drawn while training, from the averaged weights."""

    every: int = setting(10_000, "Steps between grids; 0 = never", "[0, 1e9]", resumes=True)
    count: int = setting(16, "Images in a grid", "[1, 10000]", resumes=True)
    num_steps: int = setting(50, "Sampling steps", "[1, 10000]", resumes=True)
    sampler: Literal["euler", "heun", "sde"] = setting("euler", "Sampler", resumes=True)
    cfg_scale: float = setting(4.0, "Classifier-free guidance; 1 = off", "[0, 1000]", resumes=True)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run folder, its length and what is kept."""

    dir: str = setting("", "Run folder; starting the same command again resumes it", resumes=True)
    steps: int = setting(400_000, "Optimizer steps of the whole run", "[1, 1e9]", resumes=True)
    seed: int = setting(0, "Key of every random number", "[0, 2^64)")
    log_every: int = setting(50, "Steps between rows of metrics.jsonl", "[1, 1e9]", resumes=True)
    checkpoint_every: int = setting(10_000, "Steps between checkpoints; 0 = only at the end", "[0, 1e9]", resumes=True)
    keep_checkpoints: int = setting(3, "Newest checkpoints kept; 0 = all", "[0, 1e9]", resumes=True)
    keep_every: int = setting(
        0, "Checkpoints of multiples of this are kept for ever; 0 = none", "[0, 1e9]", resumes=True
    )
    tensorboard: bool = setting(True, "Also write TensorBoard files, if it is installed", resumes=True)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run. `methods` holds one frozen Config per method, in order."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    methods: tuple[Any, ...] = ()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    run: RunConfig = field(default_factory=RunConfig)
