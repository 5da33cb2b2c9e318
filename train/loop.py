"""A whole run: build, resume, step, log, save, preview, stop; one code for one process and for ranks."""

import gc
import logging
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dit_fast import __version__
from dit_fast.data import LatentDataset, open_together
from dit_fast.data.address import absolute
from dit_fast.errors import CheckpointError, ConfigError, UserError
from dit_fast.methods import build_methods
from dit_fast.models import Backbone, new_model
from dit_fast.objectives import OBJECTIVES
from dit_fast.options import to_dict
from dit_fast.runs import TrainConfig
from dit_fast.train.checkpoints import Checkpoints
from dit_fast.train.engine import Engine, SingleEngine, own_parameters
from dit_fast.train.evaluation import LoopEvaluation
from dit_fast.train.feed import Feed, batches_of
from dit_fast.train.guard import Diverged, Guard
from dit_fast.train.journal import Journal, clear_leftovers
from dit_fast.train.lock import RunLock
from dit_fast.train.loss import TrainingLoss
from dit_fast.train.optim import STATES, learning_rate
from dit_fast.train.prepare import (
    check_fields,
    check_fits,
    check_resume,
    check_stage,
    fit_to_dataset,
    kind_of,
    micro_batch,
    narrow_model,
)
from dit_fast.train.preview import Preview
from dit_fast.train.rest import Rest, method_tensors
from dit_fast.train.rollback import Rollback, go_back, past, unique
from dit_fast.train.stages import check_ahead, load_frozen, newest_folder, stages, unfinished
from dit_fast.train.stop import Preempted, StopRequest
from dit_fast.world import World, launched

logger = logging.getLogger("dit_fast")


class RankError(UserError):
    """An error that one rank met alone; the others cannot know of it."""

    alone = True


def train(config: TrainConfig, world: World) -> int:
    """Trains until config.run.steps or until asked to stop; returns the number of steps done. Resumes by itself.

    Where a method makes several runs of it, they follow one another, and the steps are those of the last one begun.
    Raises UserError (all ranks alike, or RankError on one) for what a user can fix; what was saved before stays. Raises
    Preempted where a scheduler asked to stop and steps are left.
    """
    config = check_fields(config)
    micro = micro_batch(config.engine, world.size)
    dataset = open_together(config.data.path, world)
    runs = [fit_to_dataset(run, dataset.info) for run in stages(config)]
    for run in runs[1:]:
        check_ahead(run, dataset.info, micro)
    done = 0
    for run in runs[world.agree(lambda: unfinished(runs)) :]:
        done, stop = _train(run, world, dataset, micro, {Path(run.run.dir), Path(config.run.dir)})
        if stop is not None:
            if stop.preempted and (run is not runs[-1] or done < run.run.steps):
                raise Preempted
            break
        free_memory(world)
    return done


def _train(
    config: TrainConfig, world: World, dataset: LatentDataset, micro: int, asked_in: set[Path]
) -> tuple[int, StopRequest | None]:
    """One run: the number of steps done, and the request that stopped it. asked_in: where a file STOP may ask."""
    folder = Path(config.run.dir)
    held: list[RunLock] = []
    world.agree(lambda: held.append(RunLock(folder)))
    try:
        world.agree(lambda: clear_leftovers(folder))
        stop, rollbacks = StopRequest(asked_in, world), past(folder, world)
        while True:
            run = _Run(config, world, dataset, micro, held, rollbacks)
            try:
                done = run.train(stop)
                run.engine.close()
                return done, stop if run.stopped else None
            except Diverged as error:  # on all ranks
                first = run.first(error)
                run.guard.newest = run.checkpoints.written
                rollbacks = go_back(first, run.guard, config, world, rollbacks)
            except Exception as error:
                run.checkpoints.leave(error)
                raise
            run.engine.close()
            del run
            free_memory(world)
    finally:
        for lock in held:
            lock.release()


class _Run:
    """One process of a run: everything built before the first step, and the steps."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        dataset: LatentDataset,
        micro: int,
        held: list[RunLock],
        rollbacks: Sequence[Rollback],
    ):
        self.config, self.world, self.dataset, self.micro, self.held = config, world, dataset, micro, held
        self.accumulation = config.engine.global_batch // (micro * world.size)
        torch.manual_seed(config.run.seed)  # initial weights: the model's, then the heads' in the order of the methods
        model = new_model(config.model).to(world.device)  # where a method may copy it
        objective = OBJECTIVES[config.objective.name](config.objective, model)
        methods = build_methods(config.methods, model, dataset.info)
        if launched():
            check_stage(config.engine, (objective, *methods))
        for method in methods:
            method.check_batch(micro)
        self.fields = tuple(dict.fromkeys(name for method in methods for name in method.fields))
        dataset.require(self.fields)
        for method in methods:
            method.prepare(self._frozen)
        self.digests = {f"{each.name}.{name}": value for each in methods for name, value in each.digests.items()}
        self.stopped = False  # whether the run was asked to
        loss = TrainingLoss(
            model,
            objective,
            methods,
            seed=config.noise_seed,
            scale=dataset.info.scale,
            shift=dataset.info.shift,
            label_dropout=config.model.label_dropout,
            precision=config.engine.precision,
        )
        self.checkpoints = Checkpoints(
            Path(config.run.dir),
            world,
            config.run.keep_checkpoints,
            config.run.keep_every,
            config.run.async_checkpoint,
            self._renew,
        )
        self.autoencoder = next((method.autoencoder for method in methods if method.autoencoder), None)
        self.preview = Preview(config, dataset, world, self.autoencoder) if config.preview.every else None
        measured = (config, model, dataset, world, self.autoencoder)
        self.evaluation = LoopEvaluation(*measured) if config.evaluation.every else None
        checkpoint = self.checkpoints.newest()
        self.start = 0
        if checkpoint is not None:
            check_resume(checkpoint, config, dataset.info, self.fields, self.digests)
            self.start = checkpoint.step
            whole, trained = model.state_dict(), dict(own_parameters(loss))
            expected = {"model": whole, "ema": whole, "exp_avg": trained, "exp_avg_sq": trained}
            expected["rest"] = method_tensors(methods)
            world.agree(lambda: check_fits(checkpoint, expected))
            with self._alone():
                model.load_state_dict(checkpoint.state_dict("model"))
        state: Mapping[str, Any] = checkpoint.state if checkpoint is not None else {}
        self.guard = Guard(
            self.start or None,
            skipped=self.start - (state["optimizer_step"] if state else 0),
            recent=state.get("skipped_steps", ()),
            batch=config.engine.global_batch,
            left_out=unique([*state.get("left_out", ()), *(each.left_out for each in rollbacks)]),
            limits={"loss": config.run.loss_spike, "grad_norm": config.run.grad_spike},
            values=state.get("recent_values", {}),
            world=world,
        )
        self.flops = model.flops_per_sample()
        model.activation_checkpointing = config.engine.activation_checkpointing
        if config.engine.compile:
            for network in (model, *(teacher for method in methods for teacher in method.teachers)):
                for block in network.blocks:
                    block.compile()
        self.engine = self._engine(loss, [group for method in methods for group in method.param_groups()])
        if checkpoint is not None:
            with self._alone():
                for kind in STATES:
                    self.engine.load_full_state(kind, checkpoint.source(kind))
            self.engine.set_applied_steps(checkpoint.state["optimizer_step"])
        self.rest = Rest(methods, self.engine, config.optimizer.ema_decay, checkpoint)
        self._describe(model)
        self._warn(narrow_model(model, objective, dataset.info))

    def _frozen(self, path: str, weights: str) -> tuple[Backbone, str]:
        """`Method.prepare`'s load."""
        folder = self.world.agree(lambda: newest_folder(path))  # it may be growing
        with self._alone():
            model, digest = load_frozen(folder, weights, self.config, self.dataset.info)
        self._say(f"frozen: {folder}, {weights} (sha256 {digest[:12]})")
        return model.to(self.world.device), digest

    def _engine(self, loss: TrainingLoss, groups: list[dict[str, Any]]) -> Engine:
        if not launched():
            return SingleEngine(loss, self.config, self.world, groups)
        if self.config.engine.cuda_graph:
            raise ConfigError(
                "engine.cuda_graph=true replays steps of one process, and a launcher started this one; set "
                "engine.cuda_graph=false, or start without a launcher"
            )
        if self.config.engine.name == "ddp":
            from dit_fast.train.ddp import DDPEngine

            return DDPEngine(loss, self.config, self.world, groups)
        from dit_fast.train.zero import ZeroEngine

        return ZeroEngine(loss, self.config, self.world, self.micro, groups)

    def train(self, stop: StopRequest) -> int:
        config, guard = self.config, self.guard
        if self.start:
            self._draw(self.start, missing=True)  # a kill may have come between the checkpoint and its preview
        if self.start >= config.run.steps:
            stop.clear()
            self._say(f"step {self.start} of {config.run.steps}: nothing left to do; raise run.steps to go on")
            self._warn(guard.finish(self.start))
            return self.start
        journal = Journal(config, self.world, guard, self.start, len(self.dataset), self.flops)
        quarantine, first = journal.quarantine, guard.positions(self.start + 1)[0]
        place = (self.dataset, self.world, self.micro, first, guard.left_out, self.fields)
        batches = batches_of(config, *place, quarantine.add)
        feed = Feed(batches, self.accumulation, config.run.steps - self.start, self.world)
        try:
            if (ended := quarantine.failure()) is not None:
                raise ended
            with stop, journal.health:
                journal.health.data(feed.fetch)
                if feed.dry():
                    raise feed.failure()
                stop.agreed(feed.error is not None)
                for step in range(self.start, config.run.steps):
                    lr, done = learning_rate(config.optimizer, step), step + 1
                    result = self.engine.train_step(feed.take(), step, lr)
                    self.rest.after_update(result.applied, step)
                    if step == self.start:
                        self.rest.tensors()  # what a save will refuse is told now
                    journal.step(result)
                    guard.after_step(done, result.applied, {**result.logs, "grad_norm": result.grad_norm})
                    journal.health.data(feed.fetch)
                    leaving, last = stop.agreed(feed.error is not None), done == config.run.steps
                    failure = feed.failure() if stop.failed else None
                    every = config.run.checkpoint_every
                    saving = last or leaving or (every and done % every == 0)
                    if saving or done % config.run.log_every == 0:
                        journal.close_interval(done, lr)
                        self._warn(guard.warning(guard.close_interval(done)))
                        failure = failure or quarantine.failure()
                    if saving or failure is not None:
                        journal.drain()
                        guard.settle(done)
                        with journal.clock.away(), journal.health.doing("saves a checkpoint"):
                            self._save(done, required=last or leaving or failure is not None, failure=failure)
                    with journal.clock.away(), journal.health.doing("draws or measures images"):
                        self._draw(done, journal)
                    if failure is not None:
                        self._say(f"saved step {done}, since its data does not let it go on")
                        raise failure
                    if leaving and not last:
                        by = " by SIGUSR1" if stop.preempted else ""
                        self._say(f"stopped at step {done} as asked{by}; the same command goes on from there")
                        self.stopped = True
                        return done
                    self._renew()
                    self.checkpoints.look()
                self.stopped = leaving or stop.agreed() or stop.agreed()  # agreed on two calls after the request
                self._warn(guard.finish(config.run.steps))
            return config.run.steps
        finally:
            batches.close()  # type: ignore[attr-defined]
            journal.close()

    def first(self, error: Diverged) -> Diverged:
        """It, or what a save under way shows: that is of a step before. Collective.

        So the run goes back to where it would if it had waited for the save, or was killed or stopped in between.
        """
        try:
            self.checkpoints.settle()
        except Diverged as earlier:
            return earlier
        return error

    def _draw(self, step: int, journal: Journal | None = None, missing: bool = False) -> None:
        """Preview and evaluation of a step, where they are due; missing: only if there is none.

        journal: where values are plotted; those of an earlier process's step are in evaluations.jsonl alone.
        """
        preview, evaluation, config = self.preview, self.evaluation, self.config
        last = step == config.run.steps
        if (
            preview is not None
            and (last or not step % config.preview.every)
            and (not missing or self.world.agree(lambda: not preview.path(step).exists()))
        ):
            preview.draw(self.engine, self.rest.tensors()["ema"], step)
        if (
            evaluation is not None
            and (last or not step % config.evaluation.every)
            and (not missing or evaluation.missing(step))
        ):
            values = evaluation.measure(self.engine, self.rest.tensors()["ema"], step)
            if journal is not None:
                journal.plot({f"evaluation/{name}": value for name, value in values.items()}, step)

    def _save(self, step: int, required: bool, failure: Exception | None) -> None:
        """failure: what ends the run, named too where the disk does not take this last checkpoint."""
        # while steps are skipped, older checkpoints stay: they may be the better ones
        state, retire = self._state(step), not self.guard.in_a_row(step)
        self.checkpoints.save(self.engine, self.rest.tensors(), state, retire)
        if required and not self.checkpoints.settle():
            newest, cause = self.checkpoints.written or 0, f". The run ends: {failure}" if failure else ""
            raise CheckpointError(
                f"{self.checkpoints.folder}: no checkpoint of step {step} could be written (see above); mend that and "
                f"start the same command again, it goes on from step {newest}{cause}"
            )

    def _renew(self) -> None:
        for lock in self.held:
            lock.renew()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Around what every rank reads by itself."""
        try:
            yield
        except UserError as error:
            raise RankError(f"rank {self.world.rank}: {error}") from error

    def _state(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "samples_seen": self.guard.positions(step)[1],
            "optimizer_step": self.engine.applied_steps(),
            **self.guard.state(),
            "seed": self.config.run.seed,
            "dataset_fingerprint": self.dataset.info.fingerprint,
            "field_fingerprints": self.dataset.info.field_fingerprints(self.fields),
            "digests": self.digests,
            **({"autoencoder": self.autoencoder} if self.autoencoder else {}),
            "dataset_root": absolute(self.dataset.root),
            "ema_decay": self.config.optimizer.ema_decay,
            "config": to_dict(self.config),
            "ranks": self.world.size,
            "micro_batch": self.micro,
            "versions": {"dit_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _describe(self, model: Backbone) -> None:
        config, world = self.config, self.world
        millions = sum(shape.numel() for _, shape in self.engine.trainable()) / 1e6
        kind = kind_of(config.engine) if launched() else "one process"
        names = ", ".join(method.name for method in config.methods) or "none"
        self._say(
            f"{config.model.name}, {millions:.1f} M parameters, methods {names}; "
            f"{len(self.dataset)} samples, batch {config.engine.global_batch} = {world.size} ranks x "
            f"{self.accumulation} x {self.micro}; {kind}, {config.engine.precision}, {world.device.type}; "
            f"from step {self.start} to {config.run.steps} in {config.run.dir}"
        )

    def _say(self, text: str) -> None:
        if self.world.rank == 0:
            logger.info(text)

    def _warn(self, text: str | None) -> None:
        if text and self.world.rank == 0:
            logger.warning(text)


def free_memory(world: World) -> None:
    """Of a run that is over: engine and model hold each other."""
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
