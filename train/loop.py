"""A whole run: build, resume, step, log, save, preview, stop; one code for one process and for DeepSpeed's ranks."""

import logging
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_fast import __version__
from dit_fast.checkpoint.run import model_from_config
from dit_fast.checkpoint.step import Checkpoint
from dit_fast.config import TrainConfig
from dit_fast.data import LatentDataset, Plan, build_loader, open_dataset
from dit_fast.data.address import absolute
from dit_fast.errors import CheckpointError, UserError
from dit_fast.methods import build_methods
from dit_fast.models import SiT
from dit_fast.options import to_dict
from dit_fast.train.checkpoints import Checkpoints
from dit_fast.train.engine import Engine, SingleEngine, own_parameters
from dit_fast.train.guard import Guard
from dit_fast.train.journal import Journal
from dit_fast.train.lock import RunLock
from dit_fast.train.objective import TrainingObjective
from dit_fast.train.optim import learning_rate
from dit_fast.train.prepare import check_fields, check_resume, fit_to_dataset, micro_batch
from dit_fast.train.preview import Preview
from dit_fast.train.stop import StopRequest
from dit_fast.train.world import World, launched

logger = logging.getLogger("dit_fast")

Batch = dict[str, Tensor]


class RankError(UserError):
    """An error that one rank met alone; the others cannot know of it."""

    alone = True


def train(config: TrainConfig, world: World) -> int:
    """Trains until config.run.steps or until asked to stop; returns the number of steps done. Resumes by itself.

    Raises UserError (all ranks alike, or RankError on one) for what a user can fix; what was saved before stays.
    """
    config = check_fields(config)
    micro = micro_batch(config.engine, world.size)
    dataset = open_dataset(config.data.path)
    config = fit_to_dataset(config, dataset.info)
    run = Path(config.run.dir)
    held: list[RunLock] = []
    world.agree(lambda: held.append(RunLock(run)))
    try:
        return _Run(config, world, dataset, micro, held).train()
    finally:
        for lock in held:
            lock.release()


class _Run:
    """What the steps of one process share."""

    def __init__(self, config: TrainConfig, world: World, dataset: LatentDataset, micro: int, held: list[RunLock]):
        self.config, self.world, self.dataset, self.micro, self.held = config, world, dataset, micro, held
        methods = build_methods(config.methods)
        dataset.require(methods.batch_fields())
        torch.manual_seed(config.run.seed)
        model = model_from_config(config.model)
        methods.attach(model, dataset.info)
        objective = TrainingObjective(
            model,
            methods,
            config.flow,
            seed=config.run.seed,
            scale=dataset.info.scale,
            shift=dataset.info.shift,
            label_dropout=config.model.label_dropout,
            precision=config.engine.precision,
        )
        self.checkpoints = Checkpoints(Path(config.run.dir), world, config.run.keep_checkpoints, config.run.keep_every)
        self.preview = Preview(config, dataset, world) if config.preview.every else None
        checkpoint = self.checkpoints.newest()
        self.start = 0
        if checkpoint is not None:
            check_resume(checkpoint, config, dataset.info)
            _load_weights(model, checkpoint)
            self.start = checkpoint.step
        trained = {name for name, _ in own_parameters(objective)}
        self.frozen = {name: value.cpu().clone() for name, value in model.state_dict().items() if name not in trained}
        self.flops = model.flops_per_sample()
        if config.engine.compile:
            for block in model.blocks:
                block.compile()
        self.engine = self._engine(objective)
        if checkpoint is not None:
            for kind in ("ema", "exp_avg", "exp_avg_sq"):
                self.engine.load_full_state(kind, checkpoint.source(kind))
            self.engine.set_applied_steps(checkpoint.state["optimizer_step"])
        self.fields = methods.batch_fields()
        self._describe(model)

    def _engine(self, objective: TrainingObjective) -> Engine:
        if not launched():
            return SingleEngine(objective, self.config, self.world)
        from dit_fast.train.zero import ZeroEngine

        return ZeroEngine(objective, self.config, self.world, self.micro)

    def train(self) -> int:
        config, world = self.config, self.world
        if self.start >= config.run.steps:
            self._say(f"step {self.start} of {config.run.steps}: nothing left to do; raise run.steps to go on")
            return self.start
        guard = Guard(self.start or None)
        journal = Journal(config, world, guard, self.start, len(self.dataset), self.flops)
        batches = self._batches()
        try:
            with StopRequest(Path(config.run.dir), world) as stop:
                for step in range(self.start, config.run.steps):
                    lr, done = learning_rate(config.optimizer, step), step + 1
                    result = self.engine.train_step(self._next(batches), step, lr)
                    journal.step(result)
                    guard.after_step(done, result.applied)
                    stopping, last = stop.agreed(), done == config.run.steps
                    if done % config.run.log_every == 0 or last or stopping:
                        journal.close_interval(done, lr)
                    if last or stopping or (config.run.checkpoint_every and done % config.run.checkpoint_every == 0):
                        journal.close_interval(done, lr)
                        journal.drain()
                        with journal.clock.away():
                            self._save(done, guard, required=last or stopping)
                    if self.preview is not None and (last or done % config.preview.every == 0):
                        with journal.clock.away():
                            self.preview.draw(self.engine, self.frozen, done)
                    if stopping and not last:
                        stop.clear()
                        self._say(f"stopped at step {done} as asked; the same command goes on from there")
                        return done
                    for lock in self.held:
                        lock.renew()
            return config.run.steps
        finally:
            batches.close()  # type: ignore[attr-defined]
            journal.close()

    def _batches(self) -> Iterator[Batch]:
        config = self.config
        plan = Plan(self.dataset.info.shard_sizes, config.run.seed, config.data.shuffle_group)
        return build_loader(
            self.dataset,
            plan,
            global_batch=config.engine.global_batch,
            micro_batch=self.micro,
            rank=self.world.rank,
            world_size=self.world.size,
            start=self.start * config.engine.global_batch,
            fields=self.fields,
            num_workers=config.data.num_workers,
            reader=config.data.reader,
            check_crc=config.data.check_crc,
        )

    def _next(self, batches: Iterator[Batch]) -> list[Batch]:
        """This rank's micro-batches of one step, on the device."""
        count = self.config.engine.global_batch // (self.micro * self.world.size)
        try:
            found = [next(batches) for _ in range(count)]
        except UserError as error:
            raise RankError(f"rank {self.world.rank}: {error}") from error
        return [{k: v.to(self.world.device, non_blocking=True) for k, v in batch.items()} for batch in found]

    def _save(self, step: int, guard: Guard, required: bool) -> None:
        if self.checkpoints.save(self.engine, self.frozen, self._state(step)):
            guard.newest = step
        elif required:
            newest = f"step {guard.newest}" if guard.newest else "step 0"
            raise CheckpointError(
                f"{self.checkpoints.folder}: no checkpoint of step {step} could be written (see above); free space and "
                f"start the same command again, it goes on from {newest}"
            )

    def _state(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "samples_seen": step * self.config.engine.global_batch,
            "optimizer_step": self.engine.applied_steps(),
            "seed": self.config.run.seed,
            "dataset_fingerprint": self.dataset.info.fingerprint,
            "dataset_root": absolute(self.dataset.root),
            "ema_decay": self.config.optimizer.ema_decay,
            "config": to_dict(self.config),
            "ranks": self.world.size,
            "micro_batch": self.micro,
            "versions": {"dit_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _describe(self, model: SiT) -> None:
        config, world = self.config, self.world
        millions = sum(shape.numel() for _, shape in self.engine.trainable()) / 1e6
        kind = f"ZeRO-{config.engine.zero_stage}" if launched() else "one process"
        accumulation = config.engine.global_batch // (self.micro * world.size)
        names = ", ".join(method.name for method in config.methods) or "none"
        self._say(
            f"{config.model.name}, {millions:.1f} M parameters, skips {config.model.skip_wiring}, methods {names}; "
            f"{len(self.dataset)} samples, batch {config.engine.global_batch} = {world.size} ranks x {accumulation} "
            f"x {self.micro}; {kind}, {config.engine.precision}, {world.device.type}; from step {self.start} to "
            f"{config.run.steps} in {config.run.dir}"
        )

    def _say(self, text: str) -> None:
        if self.world.rank == 0:
            logger.info(text)


def _load_weights(model: SiT, checkpoint: Checkpoint) -> None:
    try:
        model.load_state_dict(checkpoint.state_dict("model"))
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise CheckpointError(f"{checkpoint.path}: does not fit this model: {reason}") from None
