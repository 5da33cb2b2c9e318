"""What an engine refuses: parameters that would never be trained, or that ZeRO could not share out."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dit_fast.errors import ConfigError
from dit_fast.runs import EngineConfig, OptimizerConfig, TrainConfig
from dit_fast.train.engine import SingleEngine
from dit_fast.train.prepare import check_stage
from dit_fast.world import World


class Loss(nn.Module):
    """A training loss of the test's own."""

    def __init__(self, loss, **modules):
        super().__init__()
        self.model, self.loss = nn.ModuleDict({"a": nn.Linear(2, 2), **modules}), loss

    def forward(self, batch, step):
        loss = self.loss(self.model, self.model["a"](batch["x"]))
        return loss, {"loss": loss.detach()}


def first_step(loss, before=lambda model: None):
    engine = SingleEngine(loss, TrainConfig(), World(0, 1, torch.device("cpu")))
    before(loss.model)
    engine.train_step([{"x": torch.ones(3, 2)}], 0, 1e-3)


@pytest.mark.parametrize("place", ["method", "loss", "model, late"])
def test_a_head_outside_of_the_optimizer_is_refused(place):
    head = nn.Linear(2, 1)
    loss = Loss(lambda model, x: head(x).mean())
    if place == "loss":
        loss.head = head
    late = (lambda model: model.update({"head": head})) if place == "model, late" else (lambda model: None)
    name = {"method": "outside of the model", "loss": "head.", "model, late": "model.head."}[place]
    with pytest.raises(ConfigError, match=rf"the parameter '{name}.*not in the optimizer and would never be trained"):
        first_step(loss, late)


def test_a_parameter_without_dimension_is_refused():
    scale = nn.ParameterDict({"scale": nn.Parameter(torch.tensor(1.0))})
    with pytest.raises(ConfigError, match=r"the parameter 'b\.scale' is 0-dim.*give it the shape \[1\]"):
        first_step(Loss(lambda model, x: x.mean(), b=scale))


@pytest.mark.parametrize("number", [0, 3])
def test_a_backward_of_the_loss_s_own_is_refused_in_every_step(number):
    """The hooks that see it in the first step are gone in later ones."""

    def own(model, x):
        if steps:
            x.sum().backward(retain_graph=True)
        return x.mean()

    engine = SingleEngine(Loss(own), TrainConfig(), World(0, 1, torch.device("cpu")))
    batches, steps = [{"x": torch.ones(3, 2)}] * 2, []
    for step in range(number):
        engine.train_step(batches, step, 1e-3)
    steps.append(number)
    with pytest.raises(ConfigError, match=r"a forward ran a backward of its own, to the parameter 'model\.a\."):
        engine.train_step(batches, number, 1e-3)


@pytest.mark.parametrize("own", [True, False])
def test_a_group_is_clipped_by_itself_or_with_all_others(own):
    """Its squared moment shows the norm that was applied; its rate is in proportion to the schedule's."""
    torch.manual_seed(0)
    loss = Loss(lambda model, x: 1e3 * (model["b"](x).mean() + x.mean()), b=nn.Linear(2, 2))
    group = {"params": list(loss.model["b"].parameters()), "lr": 1e-3, **({"clip": 0.25} if own else {})}
    engine = SingleEngine(loss, TrainConfig(), World(0, 1, torch.device("cpu")), [group])
    result = engine.train_step([{"x": torch.ones(3, 2)}], 0, 1e-5)
    squares = {name: x.sum().item() / (1 - 0.999) for name, x in engine.full_state("exp_avg_sq")}
    mine = sum(value for name, value in squares.items() if name.startswith("b."))
    others = sum(value for name, value in squares.items() if name.startswith("a."))
    assert mine + others == pytest.approx(1.0625 if own else 1.0, rel=1e-3)
    assert (mine == pytest.approx(0.0625, rel=1e-3)) is own
    assert result.grad_norm > 100
    assert [g["lr"] for g in engine._optimizer.param_groups] == pytest.approx([1e-5, 1e-4])


def test_a_group_holds_parameters_of_the_model():
    """A checkpoint would not hold another's moments."""
    world, group = World(0, 1, torch.device("cpu")), {"params": list(nn.Linear(2, 3).parameters())}
    with pytest.raises(ConfigError, match=r"holds the parameter 'outside of the model' \[3, 2\]; register it"):
        SingleEngine(Loss(lambda model, x: x.mean()), TrainConfig(), world, [group])


def test_a_schedule_of_rate_zero_refuses_a_group_with_a_rate_of_its_own():
    """In proportion to 0 its rate would be 0, in silence."""
    loss, world = Loss(lambda model, x: model["b"](x).mean(), b=nn.Linear(2, 2)), World(0, 1, torch.device("cpu"))
    still = TrainConfig(optimizer=OptimizerConfig(lr=0.0))
    group = {"params": list(loss.model["b"].parameters()), "lr": 1e-3}
    with pytest.raises(ConfigError, match=r"optimizer\.lr=0 stops also what has .* \(0\.001\)"):
        SingleEngine(loss, still, world, [group])
    SingleEngine(loss, still, world, [{**group, "lr": 0.0}])


def test_gradients_of_inputs_and_frozen_modules_are_no_parameters():
    """A loss may differentiate with respect to its own inputs and read modules that do not train."""
    frozen = nn.Linear(2, 1).requires_grad_(False)
    first_step(Loss(lambda model, x: frozen(x).mean() * torch.ones(1, requires_grad=True).sum()))


def test_what_differentiates_forward_is_refused_in_stage_3():
    parts = [SimpleNamespace(name="plain", functional=False), SimpleNamespace(name="tangents", functional=True)]
    check_stage(EngineConfig(zero_stage=2), parts)
    check_stage(EngineConfig(zero_stage=3), parts[:1])
    with pytest.raises(ConfigError, match=r"zero_stage=3 cannot run 'tangents'.*use engine\.zero_stage=2"):
        check_stage(EngineConfig(zero_stage=3), parts)


def test_stage_3_refuses_to_repeat_operations_one_by_one():
    check_stage(EngineConfig(zero_stage=2, activation_checkpointing="selective"), [])
    check_stage(EngineConfig(zero_stage=3, activation_checkpointing="full"), [])
    with pytest.raises(ConfigError, match=r"activation_checkpointing=selective repeats.*or engine\.zero_stage=2"):
        check_stage(EngineConfig(zero_stage=3, activation_checkpointing="selective"), [])
