"""Steps replayed from one captured graph. A stand-in on the CPU runs the captured call again with its old arguments, so
whatever changes from step to step otherwise than in a tensor that stays would come out stale."""

import pytest
import torch

from dit_fast.errors import ConfigError
from dit_fast.methods.diversedit import DiverseDiT
from dit_fast.models import build_model
from dit_fast.objectives import Flow
from dit_fast.runs import TrainConfig, changed
from dit_fast.train.engine import SingleEngine
from dit_fast.train.graph import WARM_UP
from dit_fast.train.loss import TrainingLoss
from dit_fast.train.optim import STATES
from dit_fast.world import World
from tests.ops.conftest import absent
from tests.train.test_no_waits import ALONE, batch


class Recorder:
    """Counts, and hands out results that the next replay overwrites, as a graph's are."""

    def __init__(self):
        self.eager_steps = self.captures = self.replays = 0

    def eager(self, work):
        self.eager_steps += 1
        return work()

    def capture(self, work):
        self.captures += 1
        held = []

        def replay():
            self.replays += 1
            made = work()
            if not held:
                held.append(made)
            for name, value in made.logs.items():
                held[0].logs[name].copy_(value)
            held[0].grad_norm.copy_(made.grad_norm)
            held[0].applied.copy_(made.applied)
            return held[0]

        return replay


def engine(graphs=None, pairs="all", stop=None, *overrides):
    torch.manual_seed(0)
    model = build_model("SiT-Nano/2", input_size=8, in_channels=4, num_classes=3, skip_wiring="input")
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.03)
    method = DiverseDiT(DiverseDiT.Config(pairs=pairs, stop_step=stop), model, None)
    loss = TrainingLoss(model, Flow(Flow.Config(), model), [method], seed=0, label_dropout=0.1)
    config = changed(TrainConfig(), [f"engine.cuda_graph={str(graphs is not None).lower()}", *overrides])
    return SingleEngine(loss, config, ALONE, (), graphs)


def steps(made, count=8, poisoned=()):
    results = []
    for k in range(count):
        given = [batch(6 * k), batch(6 * k + 3)]
        if k in poisoned:
            given[1]["moments"][0] = float("nan")
        results.append(made.train_step(given, k, 1e-3 * (k + 1)))
    return [[result.logs["loss"].item(), result.grad_norm.item(), result.applied.item()] for result in results]


def test_replays_equal_eager_steps_bit_for_bit():
    """Results are read after all steps; rates rise, and one step is not applied."""
    recorder = Recorder()
    graphed, eager = engine(recorder), engine()
    assert str(steps(graphed, poisoned=[6])) == str(steps(eager, poisoned=[6]))
    assert [recorder.eager_steps, recorder.captures, recorder.replays] == [WARM_UP, 1, 8 - 1 - WARM_UP]
    pairs = zip(graphed.model.named_parameters(), eager.model.parameters(), strict=True)
    assert [name for (name, mine), other in pairs if not torch.equal(mine, other)] == []
    assert graphed.applied_steps() == eager.applied_steps() == 7


def test_a_method_that_stops_makes_a_graph_of_its_own():
    recorder = Recorder()
    assert steps(engine(recorder, "all", 6), 12) == steps(engine(None, "all", 6), 12)
    assert recorder.captures == 2


def test_pairs_drawn_for_every_step_are_refused():
    with pytest.raises(ConfigError, match=r"from step 2 on every step differs.*engine\.cuda_graph=false"):
        steps(engine(Recorder(), "random_layers"), 2)


def test_a_batch_of_another_shape_is_refused_by_name():
    made = engine(Recorder())
    steps(made, 3)
    given = [batch(60), batch(63)]
    given[0]["label"] = given[0]["label"][:2]
    with pytest.raises(ConfigError, match=r"'label' of micro-batch 0 is int64 \[2\], and was int64 \[3\]"):
        made.train_step(given, 3, 1e-3)


def test_a_cpu_and_an_optimizer_that_reads_are_refused():
    with pytest.raises(ConfigError, match="needs a CUDA device, and this process runs on cpu"):
        engine(None, "all", None, "engine.cuda_graph=true")
    with pytest.raises(ConfigError, match=r"needs optimizer\.name=adamw, not torch_adamw"):
        engine(Recorder(), "all", None, "optimizer.name=torch_adamw")


@absent
@pytest.mark.parametrize("stream", ["fp32", "bf16"])
def test_a_captured_graph_repeats_eager_steps_bit_for_bit(stream):
    """On a GPU, where a graph is one: all kernels, in bf16, an update that is not applied among them."""
    device = torch.device("cuda")

    def run(graphed):
        torch.manual_seed(0)
        model = build_model("SiT-B/2", input_size=16, depth=4, skip_wiring="input", residual_dtype=stream)
        method = DiverseDiT(DiverseDiT.Config(pairs="all"), model, None)
        loss = TrainingLoss(model, Flow(Flow.Config(), model), [method], seed=0, label_dropout=0.1, precision="bf16")
        settings = [f"engine.cuda_graph={str(graphed).lower()}", "engine.precision=bf16"]
        made = SingleEngine(loss, changed(TrainConfig(), settings), World(0, 1, device))
        for parameter in model.parameters():  # zero-initialised outputs would hide what lies before them
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
        results = []
        for step in range(10):
            generator = torch.Generator(device).manual_seed(step)
            moments = torch.randn(8, 2, 4, 16, 16, generator=generator, device=device)
            moments[0] = float("nan") if step == 7 else moments[0]
            position = torch.arange(8 * step, 8 * step + 8, device=device)
            given = {"moments": moments, "label": torch.arange(8, device=device), "position": position}
            result = made.train_step([given], step, 1e-4 * (step + 1))
            results.append([x.clone() for x in (result.logs["loss"], result.grad_norm, result.applied)])
        state = {kind: {name: x.clone() for name, x in made.full_state(kind)} for kind in ("model", *STATES)}
        return [[x.item() for x in each] for each in results], state, made.applied_steps()

    (replayed, mine, count), (eager, theirs, steps_of_eager) = run(True), run(False)
    assert str(replayed) == str(eager)
    assert count == steps_of_eager == 9
    assert [
        (kind, name) for kind in mine for name in mine[kind] if not torch.equal(mine[kind][name], theirs[kind][name])
    ] == []


@absent
def test_a_step_on_a_gpu_waits_for_nothing():
    device = torch.device("cuda")
    model = build_model("SiT-B/2", input_size=16, depth=4, skip_wiring="input")
    method = DiverseDiT(DiverseDiT.Config(pairs="all"), model, None)
    loss = TrainingLoss(model, Flow(Flow.Config(), model), [method], seed=0, label_dropout=0.1, precision="bf16")
    made = SingleEngine(loss, changed(TrainConfig(), ["engine.precision=bf16"]), World(0, 1, device))
    given = {
        "moments": torch.randn(8, 2, 4, 16, 16, device=device),
        "label": torch.arange(8, device=device),
        "position": torch.arange(8, device=device),
    }
    for step in range(2):
        made.train_step([given], step, 1e-4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2, 5):
            made.train_step([given], step, 1e-4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
