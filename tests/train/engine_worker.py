"""Runs a list of scenarios on one engine each and writes what came out; started as one process or as two ranks.

python -m tests.train.engine_worker OUT.json WORK_FOLDER SCENARIO.json
"""

import dataclasses
import json
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from dit_fast.checkpoint.step import open_checkpoint
from dit_fast.errors import UserError
from dit_fast.methods import METHODS, Method, build_methods
from dit_fast.models import build_model
from dit_fast.models.sit import SiT
from dit_fast.objectives import OBJECTIVES
from dit_fast.ops import long_skip
from dit_fast.runs import EngineConfig, OptimizerConfig, RunConfig, TrainConfig
from dit_fast.train.checkpoints import Checkpoints
from dit_fast.train.ddp import DDPEngine
from dit_fast.train.engine import SingleEngine
from dit_fast.train.guard import Diverged
from dit_fast.train.loss import TrainingLoss
from dit_fast.train.prepare import check_stage
from dit_fast.train.rest import Rest
from dit_fast.world import World, launched, single
from tests.train import zero_patterns

BATCH = 8


def config_of(scenario):
    return TrainConfig(
        methods=tuple(METHODS[name].Config(**options) for name, options in scenario.get("methods", {}).items()),
        optimizer=OptimizerConfig(lr=1e-3, ema_decay=0.9, grad_clip=scenario.get("clip", 1.0), weight_decay=0.01),
        engine=EngineConfig(
            name=scenario.get("engine", "deepspeed"),
            zero_stage=scenario.get("stage", 0),
            precision=scenario.get("precision", "fp32"),
            global_batch=BATCH,
            micro_batch=scenario.get("micro", 0),
            overlap_comm=scenario.get("overlap", False),
        ),
        run=RunConfig(seed=3),
    )


def micro_batches(step, world, micro, poisoned):
    """What the loader would give this rank: global batch `step` of fixed random moments."""
    generator = torch.Generator().manual_seed(step)
    moments = torch.randn(BATCH, 2, 12, 4, 4, generator=generator)
    moments[:, 1].abs_().mul_(0.1)
    if step in poisoned:
        moments[1] = float("nan")  # the second rank's first sample
    batch = {
        "moments": moments,
        "label": torch.randint(0, 3, (BATCH,), generator=generator),
        "position": torch.arange(BATCH) + BATCH * step,
    }
    mine = {name: value[world.rank :: world.size] for name, value in batch.items()}
    return [
        {name: value[i : i + micro].contiguous() for name, value in mine.items()}
        for i in range(0, len(mine["label"]), micro)
    ]


def run(scenario, world, folder):
    config = config_of(scenario)
    micro = config.engine.micro_batch or BATCH // world.size
    torch.manual_seed(0)
    data = {"input_size": 4, "in_channels": 12, "num_classes": 3}
    # What differs between engines does not grow with the model; their hooks cost by its modules.
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 2, "skip_wiring": "input", "qk_norm": True}
    model = build_model("SiT-Nano/2", **data, **sizes)
    for parameter in model.parameters():  # zero-initialised gates would leave most gradients at zero
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    methods = build_methods(config.methods, model, None)
    loss = TrainingLoss(
        model,
        OBJECTIVES[config.objective.name](config.objective, model),
        methods,
        seed=3,
        label_dropout=0.1,
        precision=config.engine.precision,
    )
    checkpoint = open_checkpoint(folder / scenario["load"]) if "load" in scenario else None
    first = 0
    if checkpoint is not None:
        model.load_state_dict(checkpoint.state_dict("model"))
        first = checkpoint.step
    model.activation_checkpointing = scenario.get("recompute", "none")
    if scenario.get("compile"):
        for block in model.blocks:
            block.compile(backend="aot_eager")
    engine = engine_of(loss, config, world)
    restore(engine, checkpoint)
    if "write" in scenario:
        return written(engine, scenario, world, micro)
    rest = Rest(methods, engine, 0.9, checkpoint)
    result = {"losses": [], "norms": [], "applied": []}
    for step in range(first, scenario["steps"]):
        batches = micro_batches(step, world, micro, scenario.get("poisoned", ()))
        outcome = engine.train_step(batches, step, 1e-3)
        rest.after_update(outcome.applied, step)
        result["losses"].append(world.reduce(outcome.logs["loss"].clone(), "mean").item())
        result["norms"].append(float(outcome.grad_norm))
        result["applied"].append(bool(outcome.applied))
    result["optimizer_step"] = engine.applied_steps()
    result["finite"] = all(tensor.isfinite().all().item() for _, tensor in engine.full_state("model"))
    checkpoints = Checkpoints(folder / scenario["name"], world)
    state = {"step": scenario["steps"], "optimizer_step": engine.applied_steps()}
    if "broken" in scenario:
        result["diverged"] = diverged(checkpoints, engine, state, scenario["broken"])
    else:
        checkpoints.save(engine, rest.tensors(), state)
        assert checkpoints.settle()
    return result


def written(engine, scenario, world, micro):
    """The losses of four steps in whose midst something else than the optimizer writes the weights. bare: of an engine
    that keeps no copies. Modulations are made block by block, so that both sum alike; the long skip keeps W' folded."""
    model, trained = engine.model, [each for each in engine.model.parameters() if each.requires_grad]
    if scenario["bare"]:
        for weight in trained:
            weight.__dict__.pop("shadow", None)
            weight.__dict__.pop("folded", None)
    losses = []
    with (
        mock.patch.object(SiT, "_modulations", return_value={}),
        mock.patch("dit_fast.nn.long_skip.long_skip", partial(long_skip, backend="gemm")),
    ):
        for step in range(4):
            if step == 2:
                held = engine._gathered(True, modifier_rank=0) if engine.config.engine.zero_stage else nullcontext()
                with held, torch.no_grad():
                    halves = {name: 0.5 * each for name, each in model.named_parameters() if each.requires_grad}
                    if scenario["write"] == "load":
                        model.load_state_dict(halves, strict=False)
                    else:
                        torch._foreach_copy_(trained, list(halves.values()))
            outcome = engine.train_step(micro_batches(step, world, micro, ()), step, 1e-2)
            losses.append(world.reduce(outcome.logs["loss"].clone(), "mean").item())
    kept = [hasattr(weight, "shadow") for weight in trained], [_folds(weight) for weight in trained]
    return {"losses": losses, "kept": [sum(each) for each in kept]}


def _folds(weight):
    return hasattr(weight, "folded") and bool(weight.folded._tensors)


class ToyModel(torch.nn.Module):
    """Two layers, a frozen parameter, a count of the forwards and an average that moves with the step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.frozen = torch.nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(3))


class Toy(torch.nn.Module):
    """A loss that uses layer `b` in chosen steps alone."""

    def __init__(self, steps_of_b):
        super().__init__()
        self.model, self.steps_of_b = ToyModel(), steps_of_b

    def forward(self, batch, step):
        model = self.model
        hidden = model.a(batch["x"]) + model.frozen
        model.seen += 1
        model.mean.lerp_(torch.full((3,), step + 1.0), 0.5)
        loss = (model.b(hidden) if step in self.steps_of_b else hidden).square().mean()
        return loss, {"loss": loss.detach()}


class Teacher(Method):
    """Follows the weights, and averages a buffer."""

    name, averaged = "teacher", ("mean",)

    def __init__(self, model):
        self.followed = {name: x.detach().clone() for name, x in model.named_parameters() if x.requires_grad}

    def tensors(self):
        return self.followed

    def after_update(self, model, applied):
        for name, parameter in model.named_parameters():
            if name in self.followed:
                self.followed[name].lerp_(parameter, 0.25 * applied)

    def terms(self, context):
        return {}


def run_toy(scenario, world, folder):
    """Checkpoints at steps 2 and `steps`."""
    config, per_rank = config_of(scenario), BATCH // world.size
    micro = config.engine.micro_batch or per_rank
    loss = Toy(**scenario["toy"])
    methods = [Teacher(loss.model)]
    checkpoint = open_checkpoint(folder / scenario["load"]) if "load" in scenario else None
    if checkpoint is not None:
        loss.model.load_state_dict(checkpoint.state_dict("model"))
    groups = [{"params": list(loss.model.b.parameters()), "clip": 0.02, "lr": 5e-4, "weight_decay": 0.0}]
    engine = engine_of(loss, config, world, groups)
    restore(engine, checkpoint)
    rest = Rest(methods, engine, 0.9, checkpoint)
    checkpoints = Checkpoints(folder / scenario["name"], world, background=True)
    for step in range(checkpoint.step if checkpoint else 0, scenario["steps"]):
        x = torch.randn(BATCH, 4, generator=torch.Generator().manual_seed(step))[world.rank :: world.size]
        if step in scenario.get("poisoned", ()):
            x[0] = float("nan")
        outcome = engine.train_step([{"x": x[i : i + micro]} for i in range(0, per_rank, micro)], step, 1e-2)
        rest.after_update(outcome.applied, step)
        if step + 1 in (2, scenario["steps"]):
            state = {"step": step + 1, "optimizer_step": engine.applied_steps()}
            checkpoints.save(engine, rest.tensors(), state)
    assert checkpoints.settle()
    return {}


STEPS, known = 3, {}


def run_cell(scenario, world, folder):
    """Three steps of a case of `zero_patterns`: its distances from the plain loop, or the error that refused it."""
    name, precision, count = scenario["case"], scenario["precision"], scenario["micro_batches"]
    micro = BATCH // world.size // count
    config = config_of({**scenario, "micro": micro, "clip": zero_patterns.CASES[name].clip})
    optimizer = dataclasses.replace(config.optimizer, lr=zero_patterns.LR, eps=zero_patterns.EPS)
    config = dataclasses.replace(config, optimizer=optimizer)
    loss, methods = zero_patterns.build(name, precision)
    groups = [group for method in methods for group in method.param_groups()]
    try:
        if "stage" in scenario or "engine" in scenario:
            check_stage(config.engine, (loss.objective, *methods))
            engine = engine_of(loss, config, world, groups)
        else:
            engine = SingleEngine(loss, config, world, groups)
        rest = Rest(methods, engine, zero_patterns.EMA)
        for step in range(STEPS):
            outcome = engine.train_step(shares(step, world, count), step, zero_patterns.LR)
            rest.after_update(outcome.applied, step)
            untrained = rest.tensors()
    except UserError as error:
        return {"refused": str(error)}
    found = {kind: dict(engine.full_state(kind)) for kind in ("model", "ema", "exp_avg", "exp_avg_sq")}
    found["model"] |= {name: x for name, x in untrained["model"].items() if x.is_floating_point()}
    found["rest"] = untrained["rest"]
    if (name, precision, count) not in known:
        ranks = [World(rank, world.size, world.device) for rank in range(world.size)]
        steps = [list(zip(*(shares(step, rank, count) for rank in ranks), strict=True)) for step in range(STEPS)]
        with mock.patch("torch.distributed.is_initialized", return_value=False):  # a process of its own
            known[name, precision, count] = zero_patterns.plain(name, precision, steps)
    return {"differences": zero_patterns.differences(found, known[name, precision, count])}


def shares(step, world, count):
    """`count` micro-batches of this rank, which know their number in the step and have every field."""
    batches = micro_batches(step, world, BATCH // world.size // count, ())
    for i, batch in enumerate(batches):
        batch["micro"] = torch.full_like(batch["label"], i)
        for name, shape in zero_patterns.FIELDS.items():
            keyed = [torch.Generator().manual_seed(int(p)) for p in batch["position"]]
            if name == "image":
                drawn = [torch.randint(0, 256, shape, generator=key, dtype=torch.uint8) for key in keyed]
            else:
                drawn = [torch.randn(shape, generator=key) for key in keyed]
            batch[name] = torch.stack(drawn)
    return batches


def restore(engine, checkpoint):
    if checkpoint is not None:
        for kind in ("ema", "exp_avg", "exp_avg_sq"):
            engine.load_full_state(kind, checkpoint.source(kind))
        engine.set_applied_steps(checkpoint.state["optimizer_step"])


def engine_of(loss, config, world, groups=()):
    """Stage 3 holds no parameter longer than it must: its defaults would hide errors with models of this size."""
    if not launched():
        return SingleEngine(loss, config, world, groups)
    if config.engine.name == "ddp":
        return DDPEngine(loss, config, world, groups)
    from dit_fast.train import zero

    def strict(*arguments):
        options = json_of(*arguments)
        options["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
        return options

    json_of, zero.deepspeed_config = zero.deepspeed_config, strict
    try:
        micro = config.engine.micro_batch or BATCH // world.size
        return zero.ZeroEngine(loss, config, world, micro, groups)
    finally:
        zero.deepspeed_config = json_of


def diverged(checkpoints, engine, state, kind):
    """What a save says on every rank when one number of the last rank's share is Inf."""
    if engine.world.rank == engine.world.size - 1:
        flat = engine._flats()[0]
        (flat.data if kind == "model" else engine._optimizer.state[flat][kind]).view(-1)[0] = float("inf")
    try:
        checkpoints.save(engine, Rest((), engine, 0.9).tensors(), state)
        checkpoints.settle()
    except Diverged as error:
        return str(error)
    return None


def main():
    out, folder, scenarios = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
    torch.set_num_threads(1)
    if launched():
        from dit_fast.train.group import start_world

        world = start_world()
    else:
        world = single()
    results = {}
    for scenario in scenarios:
        does = run_toy if "toy" in scenario else run_cell if "case" in scenario else run
        results[scenario["name"]] = does(scenario, world, folder)
    if world.rank == 0:
        out.write_text(json.dumps(results))
    world.close()


if __name__ == "__main__":
    main()
