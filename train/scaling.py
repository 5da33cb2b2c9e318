"""A plan of a run on many GPUs, from FLOPs, bytes and link speeds: `dit-fast info --plan RECIPE --gpus N`.

Nothing here is a measurement of such a run. docs/scaling.md tells the formulas, what they leave out, and by how much
they miss what others have published.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dit_fast.errors import ConfigError
from dit_fast.runs import EngineConfig, TrainConfig
from dit_fast.train.memory import FLOAT, Planner, sized
from dit_fast.train.prepare import kind_of, micro_batch


@dataclass(frozen=True)
class GPU:
    """From NVIDIA's data sheets (SXM): dense FLOP/s, bytes of memory, bytes/s one way by NVLink and by PCIe."""

    name: str
    bf16: float
    fp32: float
    memory: float
    link: float
    pcie: float


GPUS = {
    "h800": GPU("H800", 989e12, 67e12, 80e9, 200e9, 64e9),
    "h100": GPU("H100", 989e12, 67e12, 80e9, 450e9, 64e9),
    "h200": GPU("H200", 989e12, 67e12, 141e9, 450e9, 64e9),
    "a100": GPU("A100", 312e12, 19.5e12, 80e9, 300e9, 32e9),
}
NIC = 50e9  # bytes/s one way: one 400 Gb/s adapter for each GPU, as in HGX machines
# DeepEP's README (docs/legacy.md) reaches 160 of the H800's 200 GB/s of NVLink, and 43 of 50 GB/s of each adapter.
LINK_SHARE, NIC_SHARE = 160 / 200, 43 / 50
PCIE_SHARE = 55.63 / 64  # of generation 5, in an example of nvbandwidth's output (docs/scaling.md)
WRITTEN = 1e9  # bytes/s that one rank hashes and writes while all do; assumed
# benchmarks/results/nvidia-h200/first_run/step_c4cc395.json, "dit_fast, all pairs": B/2 b256 reaches 2.80e14 of 989e12
# FLOP/s; the host needs 100.6 ms for a micro-batch of B/2 b32 (12 blocks) and 219.3 ms of XL/2 b32 (28 blocks).
UTILISATION = 0.283
HOST_BLOCK = (0.219278 - 0.100559) / 16
HOST = 0.100559 - 12 * HOST_BLOCK
RECOMPUTED = {"full": 4 / 3}  # of forward and backward: full repeats the forward
ENGINES: tuple[dict[str, Any], ...] = ({"name": "ddp"}, *({"zero_stage": stage} for stage in range(4)))


def traffic(engine: EngineConfig, trained: int, micro_batches: int) -> dict[str, int]:
    """Bytes of one step by collective, of the whole that is reduced or gathered; what takes a few bytes is left out.

    trained: elements. Checked against traced ranks in tests/train/test_scaling.py.
    """
    whole, reduced = FLOAT * trained, (2 if engine.communication_dtype == "bf16" else FLOAT) * trained
    if engine.name == "ddp" or engine.zero_stage == 0:
        return {"allreduce": reduced}
    if engine.zero_stage == 1:
        return {"allreduce": reduced, "allgather": whole}
    if engine.zero_stage == 2:
        return {"allreduce": reduced * micro_batches, "allgather": whole}
    return {"reduce_scatter": reduced * micro_batches, "allgather": whole}  # kept whole below 10^9 elements


def saved(engine: EngineConfig, sizes: Sequence[int], ranks: int) -> int:
    """Bytes that a rank copies and writes at a save, of the rank with most: weights, average, two moments.

    sizes: elements of the trained parameters. Checked against files that two ranks wrote in
    tests/train/test_scaling.py.
    """
    apart = engine.name != "ddp" and engine.zero_stage == 3  # which shares out each parameter, and not all end to end
    return 4 * FLOAT * sum(-(-size // ranks) for size in (sizes if apart else [sum(sizes)]))


@dataclass(frozen=True)
class Plan:
    """Of one engine on so many GPUs. Seconds are of a step; exposed: of collectives that nothing hides.

    memory: bytes on each. hours: GPU-hours of the whole run. fits: whether the memory suffices. saved: bytes of a
    checkpoint that each copies and writes; copying: seconds that it waits for them.
    """

    engine: str
    gpus: int
    micro: int
    micro_batches: int
    compute: float
    exposed: float
    memory: int
    hours: float
    images: float  # per second, of all
    fits: bool
    saved: int
    copying: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


def plan(planner: Planner, gpus: int, gpu: GPU, node: int) -> Plan:
    """Of the planner's configuration. node: GPUs of one machine. Raises ConfigError where batches do not divide."""
    config, model = planner.config, planner.loss.model
    engine = config.engine
    micro = micro_batch(engine, gpus)
    count = engine.global_batch // gpus // micro
    peak = gpu.bf16 if engine.precision == "bf16" else gpu.fp32
    flops = 3 * model.flops_per_sample() * micro * RECOMPUTED.get(engine.activation_checkpointing, 1.0)
    once = max(HOST + HOST_BLOCK * len(model.blocks), flops / (peak * UTILISATION))
    speed = LINK_SHARE * gpu.link
    if gpus > node:  # rings enter and leave a machine by all of its adapters
        speed = min(speed, node * NIC * NIC_SHARE)
    sent = traffic(engine, planner.trained, count) if gpus > 1 else {}
    times = {kind: (2 if kind == "allreduce" else 1) * (gpus - 1) / gpus * size / speed for kind, size in sent.items()}
    hidden = engine.name == "ddp" or (engine.overlap_comm and engine.zero_stage > 1)
    reduces = sum(seconds for kind, seconds in times.items() if kind != "allgather")
    exposed = times.get("allgather", 0.0) + (max(0.0, reduces - 2 / 3 * once) if hidden else reduces)
    memory = planner.over(engine, gpus).memory(micro, count > 1).total
    seconds = once * count + exposed
    size = saved(engine, [each.numel() for each in planner.parameters], gpus)
    return Plan(
        engine=kind_of(engine) if gpus > 1 else "one process",
        gpus=gpus,
        micro=micro,
        micro_batches=count,
        compute=once * count,
        exposed=exposed,
        memory=memory,
        hours=seconds * config.run.steps * gpus / 3600,
        images=engine.global_batch / seconds,
        fits=memory <= gpu.memory,
        saved=size,
        copying=size / (gpu.pcie * PCIE_SHARE),
    )


def plans(
    config: TrainConfig, gpus: Sequence[int], gpu: GPU, node: int, per_gpu: int = 0
) -> list[Plan | tuple[int, str]]:
    """By GPUs, then by engine; (gpus, why) where the run's batch cannot be shared so.

    per_gpu: samples of each GPU; the batch grows with them and the steps fall, so that a run sees as many samples.
    """
    config, info = sized(config)
    # one that has no stage 3 would be refused as a whole
    first = dataclasses.replace(config, engine=dataclasses.replace(config.engine, zero_stage=1, name="deepspeed"))
    planner, found = Planner(first, info), list[Plan | tuple[int, str]]()
    for number in gpus:
        batch = per_gpu * number or config.engine.global_batch
        steps = max(1, round(config.run.steps * config.engine.global_batch / batch))
        for changes in ENGINES:
            engine = dataclasses.replace(config.engine, name="deepspeed", global_batch=batch)
            engine = dataclasses.replace(engine, **changes)
            try:
                made = planner.over(engine, number)
            except ConfigError as error:
                found.append((number, str(error)))
                break
            made.config = dataclasses.replace(made.config, run=dataclasses.replace(config.run, steps=steps))
            found.append(plan(made, number, gpu, node))
    return found


def report(config: TrainConfig, gpus: Sequence[int], gpu: str, node: int, per_gpu: int = 0) -> str:
    """What `dit-fast info --plan` prints, a table in Markdown. Raises UserError for what cannot be planned."""
    if min(gpus) < 1 or node < 1 or per_gpu < 0:
        raise ConfigError("--plan: --gpus, --nodes-of and --per-gpu take numbers from 1 on")
    kind = GPUS[gpu]
    heads = ("GPUs", "engine", "samples of each", "ms a step", "of which exposed", "img/s", "GPU-hours", "GB of each")
    lines = [
        f"A plan, not a measurement: {config.model.name}, {kind.name}, machines of {node}, {config.engine.precision}, "
        f"{UTILISATION:.0%} of the data sheet's FLOP/s (docs/scaling.md has every factor).",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    most: dict[int, Plan] = {}  # by GPUs: the engine in which one saves most; they hardly differ
    for row in plans(config, gpus, kind, node, per_gpu):
        if isinstance(row, tuple):
            lines.append(f"| {row[0]} | cannot: {row[1]} |" + " |" * (len(heads) - 2))
            continue
        if row.gpus not in most or row.saved > most[row.gpus].saved:
            most[row.gpus] = row
        samples = f"{row.micro_batches} x {row.micro}" if row.micro_batches > 1 else f"{row.micro}"
        size = f"{row.memory / 1e9:.1f}" + ("" if row.fits else " (too much)")
        lines.append(
            f"| {row.gpus} | {row.engine} | {samples} | {row.seconds * 1e3:.0f} | {row.exposed * 1e3:.1f} | "
            f"{row.images:,.0f} | {row.hours:,.0f} | {size} |"
        )
    if most:
        lines += ["", "| GPUs | GB that each saves | ms copied, while it waits | s written, behind the steps |"]
        lines += ["|---" * 4 + "|"]
    for number, row in most.items():
        lines.append(f"| {number} | {row.saved / 1e9:.3f} | {row.copying * 1e3:.1f} | {row.saved / WRITTEN:.2f} |")
    return "\n".join(lines)
