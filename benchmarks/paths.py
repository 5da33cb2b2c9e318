"""Do the fast paths learn as plain torch does? python -m dit_fast.benchmarks.paths SHARDS.

A recipe of quick-start size for 300 steps on real latents, by torch's arithmetic alone and as the trainer runs it, in
fp32 and in bf16, with two seeds of the initial weights. Data order and noise are the same in all runs, so that losses
can be compared step by step. Kept are all losses and how far sides and seeds lie apart at each step; a figure is drawn.
Nothing is timed: the values depend neither on the machine's load nor on its clock.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dit_fast import backend
from dit_fast.analysis.figures import GRID, INK, STYLE, to_png
from dit_fast.benchmarks.baselines.published_step import PlainTrainer
from dit_fast.benchmarks.results import RESULTS, environment, occasion, rounded, slug, write
from dit_fast.data import LatentDataset, Plan, build_loader, open_dataset
from dit_fast.errors import UserError
from dit_fast.files import replace
from dit_fast.methods import METHODS, Term
from dit_fast.methods.diversedit import DiverseDiT
from dit_fast.models import new_model
from dit_fast.objectives import OBJECTIVES, Context
from dit_fast.ops import diversity_loss
from dit_fast.recipes import load
from dit_fast.report.metrics import smooth
from dit_fast.report.reference import data_identity
from dit_fast.runs import TrainConfig
from dit_fast.train.engine import SingleEngine
from dit_fast.train.loss import TrainingLoss
from dit_fast.train.optim import learning_rate
from dit_fast.train.prepare import check_fields, fit_to_dataset
from dit_fast.world import World, single

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECIPE, STEPS, SEEDS = "quickstart", 300, (0, 1)
SETTINGS = (f"run.steps={STEPS}", "run.noise_seed=0", "data.seed=0", "engine.global_batch=8")
REFERENCE, OTHER_ADAMW, OURS, STREAM = "torch", "torch, its fused AdamW", "dit_fast", "dit_fast, bf16 stream"
TYPES = {"fp32": (REFERENCE, OTHER_ADAMW, OURS), "bf16": (REFERENCE, OURS, STREAM)}
SPREAD = "two seeds of torch"
WINDOW = 20  # steps over which the figure and the summary average
COLOURS = {REFERENCE: INK, OTHER_ADAMW: "#b7791f", OURS: "#2a6fdb", STREAM: "#2f9e73", SPREAD: "#8a8f98"}


class PlainDiversity(DiverseDiT):
    """The same loss by autograd through the blocks' outputs: no taps, no gradient of ours."""

    def collector(self) -> None:  # type: ignore[override]
        return None

    def terms(self, context: Context) -> dict[str, Term]:
        features = [context.features[block] for block in sorted(context.features)]
        total = diversity_loss(features, self.pairs, self.config.variant).total
        return {f"{self.name}/total": Term(total, self._weight(total))}


def losses(config: TrainConfig, dataset: LatentDataset, world: World, side: str) -> Iterator[Tensor]:
    """The loss of each step, 0-d, of one run on the recipe's own batches."""
    plain = side in (REFERENCE, OTHER_ADAMW)
    kinds: Mapping[str, Any] = {**METHODS, **({DiverseDiT.name: PlainDiversity} if plain else {})}
    torch.manual_seed(config.run.seed)
    model = new_model(config.model).to(world.device)
    loss = TrainingLoss(
        model,
        OBJECTIVES[config.objective.name](config.objective, model),
        [kinds[each.name](each, model, dataset.info) for each in config.methods],
        seed=config.noise_seed,
        scale=dataset.info.scale,
        shift=dataset.info.shift,
        label_dropout=config.model.label_dropout,
        precision=config.engine.precision,
    ).to(world.device)
    if plain:
        run = partial(_plain_step, PlainTrainer(loss, config.optimizer, fused=side == OTHER_ADAMW))
    else:
        run = partial(_step, SingleEngine(loss, config, world))
    plan, size = Plan(dataset.info.shard_sizes, config.data_seed, config.data.shuffle_group), config.engine.global_batch
    batches = build_loader(dataset, plan, global_batch=size, micro_batch=size, rank=0, world_size=1, start=0)
    for step, batch in enumerate(islice(batches, STEPS)):
        moved = {name: value.to(world.device) for name, value in batch.items()}
        yield run(moved, step, learning_rate(config.optimizer, step))


def _step(engine: SingleEngine, batch: Mapping[str, Tensor], step: int, lr: float) -> Tensor:
    return engine.train_step([batch], step, lr).logs["loss"]


def _plain_step(trainer: PlainTrainer, batch: Mapping[str, Tensor], step: int, lr: float) -> Tensor:
    for group in trainer.optimizer.param_groups:
        group["lr"] = lr
    with backend.force("torch"):
        return trainer.train_step(batch, step)


def implementations(device: torch.device) -> dict[str, str]:
    """By op, what `dit_fast` runs here where that is not plain torch. Raises UserError where that is nothing."""
    told = {op: backend.explain(op, device.type) for op in backend.ops()}
    fast = {op: name for op, lines in told.items() for name, why in lines if why == "used" and name != "torch"}
    if not fast:
        raise UserError(f"on {device.type} every op runs by torch, so there is nothing to compare; run make native")
    return fast


def apart(curves: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, list[float]]:
    """By side: relative difference of its loss from torch's at each step, the larger of both seeds'; last, of seeds."""
    sides = {name: np.array(runs) for name, runs in curves.items()}
    torchs = sides.pop(REFERENCE)
    found = {name: (abs(runs - torchs) / torchs).max(0) for name, runs in sides.items()}
    found[SPREAD] = abs(torchs[0] - torchs[1]) / torchs.mean(0)
    return {name: values.tolist() for name, values in found.items()}


def figure(curves: Mapping[str, Any], distances: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Losses above, running means of the relative differences below; fp32 left, bf16 right."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        page = Figure(figsize=(10, 6), layout="constrained", dpi=110)
        grid = page.subplots(2, len(TYPES), sharex=True, sharey="row")
        for (above, below), (precision, sides) in zip(grid.T, TYPES.items(), strict=True):
            steps = np.arange(1, STEPS + 1)
            for side in (REFERENCE, OURS, *(side for side in sides if side == STREAM)):
                for seed, values in zip(SEEDS, curves[precision][side], strict=True):
                    label = f"{side}, seeds {' and '.join(map(str, SEEDS))}" if seed == SEEDS[0] else None
                    thick = 3.0 if side == REFERENCE else 1.2
                    averaged = smooth(np.array(values), WINDOW)
                    above.plot(steps, averaged, color=COLOURS[side], linewidth=thick, alpha=0.8, label=label)
            for name, values in distances[precision].items():
                below.plot(steps, smooth(np.array(values), WINDOW), color=COLOURS[name], label=name)
            above.set(title=precision)
            below.set(xlabel="step", yscale="log")
            for axes in (above, below):
                axes.grid(color=GRID)
                axes.legend(frameon=False, fontsize=8.5)
        grid[0, 0].set_ylabel(f"loss, mean over {WINDOW} steps")
        grid[1, 0].set_ylabel(f"relative difference, mean over {WINDOW} steps")
    return page


def measure(data: str, world: World, say: Callable[[str], None] = print) -> dict[str, Any]:
    """All runs on the shards at `data`; what the file holds beside the environment."""
    fast, dataset = implementations(world.device), open_dataset(data)
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for precision, sides in TYPES.items():
        for side in sides:
            for seed in SEEDS:
                stream = "bf16" if side == STREAM else "fp32"
                own = (f"engine.precision={precision}", f"model.residual_dtype={stream}", f"run.seed={seed}")
                config = check_fields(load(RECIPE, [*SETTINGS, *own, f"data.path={data}"]))
                run = losses(fit_to_dataset(config, dataset.info), dataset, world, side)
                curve = [float(f"{loss:.9g}") for loss in torch.stack([*run]).tolist()]  # float32, whole
                curves.setdefault(precision, {}).setdefault(side, []).append(curve)
                say(f"{precision}, {side}, seed {seed}: last loss {curve[-1]:.7g}")
    return {
        "recipe": RECIPE,
        "settings": SETTINGS,
        "data": data_identity(dataset.info, []),
        "seeds": SEEDS,
        "implementations": fast,
        "apart": {precision: rounded(apart(each)) for precision, each in curves.items()},
        "losses": curves,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="SHARDS", help="latent shards of the quick start")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of DEVICE/paths.json and DEVICE/paths.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    world = single()
    where = environment(world.device)
    found = measure(arguments.data, world, partial(print, flush=True))
    path = arguments.out / slug(world.device) / "paths.json"
    write(path, {"schema": 1, "run": "paths", **where, **occasion(), **found})
    replace(path.with_suffix(".png"), to_png(figure(found["losses"], found["apart"])))
    for precision, distances in found["apart"].items():
        for name, values in distances.items():
            late = values[STEPS // 2 :]
            print(f"{precision} {name:24} mean {np.mean(values):.2e}, of the second half {np.mean(late):.2e}, "
                  f"largest {max(values):.2e}, first step {values[0]:.2e}")  # fmt: skip


if __name__ == "__main__":
    main()
