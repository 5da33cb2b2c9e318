"""Numbers while training: all ranks draw from the averaged weights, and the run's curve of evaluations grows."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_fast import autoencoders
from dit_fast.checkpoint.run import LoadedRun, own_autoencoder
from dit_fast.data import LatentDataset
from dit_fast.errors import ConfigError, UserError
from dit_fast.evaluation.evaluate import FOLDER, conclude, draw_features, open_reference, prepared
from dit_fast.evaluation.measure import check_metrics
from dit_fast.evaluation.networks import load_network
from dit_fast.evaluation.records import append_evaluation, read_evaluations
from dit_fast.models import Backbone, new_model
from dit_fast.runs import TrainConfig
from dit_fast.sampling.options import SampleOptions
from dit_fast.train.engine import Engine
from dit_fast.train.guard import Diverged, Finiteness
from dit_fast.world import World

logger = logging.getLogger("dit_fast")


class LoopEvaluation:
    """RUN/evaluations.jsonl gets a line every `evaluation.every` steps and at the end; training's numbers do not move.

    own: configuration of an autoencoder that the run trains (`Method.autoencoder`), which then decodes.
    Construction loads the network and extracts the reference's features, once per run folder; UserError, on all ranks,
    where that cannot be done. What goes wrong later is a warning, and training goes on.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Backbone,
        dataset: LatentDataset,
        world: World,
        own: Mapping[str, Any] | None = None,
    ):
        self._config, self._dataset, self._world, self._own = config, dataset, world, own
        group, self._folder = config.evaluation, Path(config.run.dir)
        try:
            with torch.random.fork_rng(devices=[]):
                network = load_network(group.network, world.device)
            chosen = SampleOptions(
                count=group.count,
                labels=group.labels,
                num_steps=None if group.sampler == "dopri5" else group.num_steps,
                sampler=group.sampler,
                cfg_scale=group.cfg_scale,
                seed=config.run.seed,
                chunk=group.batch,
            )
            self._options = chosen.resolved(LoadedRun(model, config, {"step": 0}), dataset)
            place = self._folder / FOLDER
            reference = open_reference(group.reference or None, dataset, network, place, None, world)
        except UserError as error:
            raise ConfigError(f"evaluation: {error}") from None
        self._autoencoder = None if own else autoencoders.of(dataset)
        metrics = check_metrics((), network)
        self._done(lambda: reference.extract(world, lambda images: None))
        self._evaluator, left = prepared(reference, network, metrics, False, place, world, lambda images: None)
        for line in left:
            logger.warning(line)
        world.agree(lambda: None)  # no rank begins to train while rank 0 still sums

    def missing(self, step: int) -> bool:
        """Whether there is no evaluation of this step. Collective."""
        return self._world.agree(lambda: all(each.step != step for each in read_evaluations(self._folder)))

    def measure(self, engine: Engine, untrained: Mapping[str, Tensor], step: int) -> dict[str, float]:
        """The values by metric; {} where it failed. Collective.

        Raises Diverged, on all ranks, for averages with NaN.
        """
        weights: dict[str, Tensor] = {name: x.cpu() for name, x in untrained.items()}
        finite = Finiteness(self._world)
        for name, tensor in engine.full_state("ema"):
            finite.look(f"ema of '{name}'", tensor)
            weights[name] = tensor.cpu().clone()
        if (exception := finite.first_exception()) is not None:
            raise Diverged(f"{exception} is not finite after step {step}, so nothing was evaluated", (step, step))
        try:
            return self._measure(weights, step)
        except UserError as error:
            if not self._world.rank:
                logger.warning("step %d was not evaluated: %s; training goes on", step, error)
            return {}

    def _measure(self, weights: Mapping[str, Tensor], step: int) -> dict[str, float]:
        with torch.random.fork_rng(devices=[]):  # building it must not move the random numbers of the run
            model = new_model(self._config.model)
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        own = own_autoencoder(self._own, weights)
        decoder = own or self._autoencoder
        assert decoder is not None
        run = LoadedRun(model.eval(), self._config, {"step": step}, own)
        what: Any = ([self._evaluator], run, self._options, self._dataset, decoder)
        # those of a run that was killed here, whose bits may have been others
        self._world.agree(lambda: self._evaluator.parts_of(*what[1:]).remove())
        self._done(lambda: draw_features(*what))

        def write() -> dict[str, Any]:
            (found,) = conclude(*what)
            append_evaluation(self._folder, found)
            self._evaluator.parts_of(*what[1:]).remove()
            values = "  ".join(f"{name} {value:.5g}" for name, value in found.values.items())
            return {
                "values": dict(found.values),
                "line": f"step {step}: {values} ({found.protocol.text()})",
            }

        written = self._world.agree(write)
        if not self._world.rank:
            logger.info(written["line"])
        return written["values"]

    def _done(self, work: Any) -> None:
        """Every rank's work; UserError, on all, where one of them failed."""
        failure = ""
        try:
            work()
        except (UserError, OSError) as error:
            failure = str(error)
        for rank in range(self._world.size):
            text = self._world.agree(lambda: failure, rank)
            if text:
                raise UserError(text)
