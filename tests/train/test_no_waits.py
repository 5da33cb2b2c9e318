"""Whole steps of one process read nothing back from the device: every read would be a wait on a GPU."""

import pytest
import torch

from dit_fast import _C, backend
from dit_fast.benchmarks.cost import HOST_READS, host_waits
from dit_fast.errors import ConfigError
from dit_fast.methods.diversedit import DiverseDiT
from dit_fast.models import build_model
from dit_fast.objectives import Flow
from dit_fast.runs import TrainConfig, changed
from dit_fast.train.engine import SingleEngine
from dit_fast.train.guard import Guard
from dit_fast.train.journal import Journal
from dit_fast.train.loss import TrainingLoss
from dit_fast.train.rest import Rest
from dit_fast.world import World

ALONE = World(0, 1, torch.device("cpu"))


def batch(first):
    generator = torch.Generator().manual_seed(first)
    return {
        "moments": torch.randn(3, 2, 4, 8, 8, generator=generator),
        "label": torch.tensor([0, 1, 2]),
        "position": torch.arange(first, first + 3),
    }


@pytest.mark.parametrize(("pairs", "implementation"), [("all", "cpp"), ("release", "fused")])
def test_a_whole_step_reads_nothing_back(tmp_path, pairs, implementation):
    """ "fused" is what runs on CUDA without our library."""
    if implementation == "cpp" and _C.unavailable():
        pytest.skip(_C.unavailable())
    model = build_model("SiT-Nano/2", input_size=8, in_channels=4, num_classes=3, skip_wiring="input")
    config = changed(TrainConfig(), [f"run.dir={tmp_path}", "run.tensorboard=false", "optimizer.warmup_steps=9"])
    method = DiverseDiT(DiverseDiT.Config(pairs=pairs), model, None)
    loss = TrainingLoss(model, Flow(Flow.Config(), model), [method], seed=0, label_dropout=0.1)
    engine = SingleEngine(loss, config, ALONE)
    rest, journal = Rest([method], engine, 0.99), Journal(config, ALONE, Guard(), 0, 100, 1)

    def step(number):
        result = engine.train_step([batch(6 * number), batch(6 * number + 3)], number, 1e-4 * (number + 1))
        rest.after_update(result.applied, number)
        journal.step(result)

    with backend.force(implementation):
        step(0)  # asks once whether all ranks use the same parameters
        assert [host_waits(lambda number=number: step(number), ALONE.device) for number in (1, 2)] == [0, 0]
    assert engine.applied_steps() == 3
    journal.close()


def test_a_read_would_be_seen():
    assert "_local_scalar_dense" in HOST_READS
    assert host_waits(lambda: bool(torch.ones(())), ALONE.device) == 1


class Norm(torch.nn.Module):
    """BatchNorm1d's mean and variance, moved in every way in which a forward can."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.way == "kernel":
            return torch.nn.functional.batch_norm(x, mean, var, training=True)
        for name, old, new in (("running_mean", mean, x.mean(0)), ("running_var", var, x.var(0))):
            if self.way == "data":
                old.data.lerp_(new.detach(), 0.1)
            elif self.way == "in place":
                old.lerp_(new.detach(), 0.1)
            else:
                setattr(self, name, torch.lerp(old, new.detach(), 0.1))
        return x


@pytest.mark.parametrize("way", ["kernel", "data", "in place", "new tensor"])
def test_buffers_of_a_step_that_is_not_applied_are_put_back(way):
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), Norm(way))

        def forward(self, given, number):
            loss = self.model(given["x"]).square().mean()
            return loss, {"loss": loss.detach()}

    torch.manual_seed(0)
    engine, states = SingleEngine(Loss(), TrainConfig(), ALONE), []
    mean = engine.model[2].running_mean
    for number, x in enumerate((torch.randn(5, 4), torch.full((5, 4), float("nan")), torch.randn(5, 4))):
        result = engine.train_step([{"x": x}], number, 1e-3)
        states.append({name: buffer.clone() for name, buffer in engine.model.named_buffers()})
        assert result.applied == (number != 1)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any(torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert states[2]["1.num_batches_tracked"] == 2
    assert engine.model[2].running_mean is mean  # a replayed step writes where the captured one did


def test_a_buffer_that_grows_is_refused():
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(4, 4)
            self.model.register_buffer("queue", torch.zeros(1, 4))

        def forward(self, given, number):
            self.model.queue = torch.cat([self.model.queue, given["x"]])
            return self.model(given["x"]).sum(), {}

    with pytest.raises(ConfigError, match="'queue' of Linear"):
        SingleEngine(Loss(), TrainConfig(), ALONE).train_step([{"x": torch.ones(2, 4)}], 0, 1e-3)
