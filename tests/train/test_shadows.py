"""Copies of weights for autocast: the same bits as autocast's own, in fewer operations, written by the optimizer."""

import copy
import functools

import pytest
import torch

from dit_fast.benchmarks.cost import _Count
from dit_fast.methods.diversedit import DiverseDiT
from dit_fast.models import build_model
from dit_fast.models.sit import SiT
from dit_fast.nn.linear import Linear
from dit_fast.objectives import Flow
from dit_fast.ops import long_skip, long_skip_rows
from dit_fast.ops.linear import shadow_of
from dit_fast.runs import TrainConfig, changed
from dit_fast.train.engine import SingleEngine
from dit_fast.train.loss import TrainingLoss
from dit_fast.train.optim import STATES, set_applied_steps
from tests.train.test_no_waits import ALONE, batch


def engine(precision="bf16", shadows=True, compile=False):
    torch.manual_seed(0)
    model = build_model("SiT-Nano/2", input_size=8, in_channels=4, num_classes=3, skip_wiring="input")
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.03)
    if compile:
        for block in model.blocks:
            block.compile(backend="aot_eager")
    method = DiverseDiT(DiverseDiT.Config(pairs="all"), model, None)
    loss = TrainingLoss(model, Flow(Flow.Config(), model), [method], seed=0, label_dropout=0.1, precision=precision)
    made = SingleEngine(
        loss, changed(TrainConfig(), [f"engine.precision={precision}", f"engine.compile={compile}"]), ALONE
    )
    if not shadows:
        for weight in model.parameters():
            weight.__dict__.pop("shadow", None)
            weight.__dict__.pop("folded", None)
    return made


def losses(made, steps=3):
    return [made.train_step([batch(6 * k), batch(6 * k + 3)], k, 1e-2).logs["loss"].item() for k in range(steps)]


def test_curves_are_those_of_autocast_bit_for_bit(monkeypatch):
    monkeypatch.setattr(
        SiT, "_modulations", lambda self, c: {}
    )  # whose sums for c are rounded once, not in every block
    with_shadows, without = engine(), engine(shadows=False)
    assert losses(with_shadows) == losses(without)
    pairs = zip(with_shadows.model.named_parameters(), without.model.parameters(), strict=True)
    assert [name for (name, mine), other in pairs if not torch.equal(mine, other)] == []


def test_a_shadow_that_came_after_the_first_step_is_written_where_it_is_read():
    """The optimizer goes on writing the one that it found first."""
    made = engine()
    losses(made, 1)
    parameter = made.model.blocks[0].mlp.fc1.weight
    parameter.shadow = later = parameter.detach().bfloat16()
    later.of_version = parameter._version
    losses(made, 2)
    assert shadow_of(parameter, torch.bfloat16) is later
    assert torch.equal(later, parameter.detach().bfloat16())


def test_shadows_follow_the_weights_and_copies_of_a_model_have_none():
    made = engine()
    losses(made, 2)
    layers = [module for module in made.model.modules() if isinstance(module, Linear)]
    shadowed = [layer for layer in layers if hasattr(layer.weight, "shadow")]
    assert shadowed
    assert all(torch.equal(layer.weight.shadow, layer.weight.bfloat16()) for layer in shadowed)
    assert not any(hasattr(weight, "shadow") for weight in copy.deepcopy(made.model).parameters())
    assert not any(hasattr(weight, "shadow") for weight in engine("fp32").model.parameters())


def test_a_long_skip_folds_its_weights_once_per_step(monkeypatch):
    folds = []
    fold = long_skip_rows._fold
    monkeypatch.setattr(long_skip_rows, "_fold", lambda *given: folds.append(1) or fold(*given))
    monkeypatch.setattr("dit_fast.nn.long_skip.long_skip", functools.partial(long_skip, backend="gemm"))
    monkeypatch.setattr(SiT, "_modulations", lambda self, c: {})
    kept, bare = engine(), engine(shadows=False)
    pairs = len(kept.model.skip_norms)
    assert losses(kept, 1) == losses(bare, 1)
    assert len(folds) == pairs * (1 + 1 + 4)  # first read, after the step, and every pass of two micro-batches
    folds.clear()
    by_copying(kept.model), by_copying(bare.model)
    first = [losses(made, 1) for made in (kept, bare)]
    assert first[0] == first[1]
    assert len(folds) == pairs * (1 + 1 + 4)
    folds.clear()
    losses(kept, 2)
    assert len(folds) == pairs * 2
    weights = [layer.linear.weight for layer in kept.model.skip_linears]
    assert not any(weight.folded.is_stale for weight in weights)
    assert not any(hasattr(x, "folded") for x in engine("fp32").model.parameters())


def by_copying(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)


def by_loading(model):
    model.load_state_dict({name: 0.5 * value for name, value in model.state_dict().items()})


@pytest.mark.parametrize("write", [by_copying, by_loading])
@pytest.mark.parametrize("compile", [False, True])
def test_a_weight_written_behind_the_optimizers_back_is_read_as_it_is(monkeypatch, write, compile):
    monkeypatch.setattr(SiT, "_modulations", lambda self, c: {})
    sides = engine(compile=compile), engine(shadows=False, compile=compile)
    for made in sides:
        losses(made, 1)
        write(made.model)
    assert losses(sides[0], 2) == losses(sides[1], 2)


def test_a_skipped_step_and_a_resume_leave_none_behind():
    made, fresh = engine(), engine()
    losses(made, 2)
    before = [parameter.clone() for parameter in made.model.parameters()]
    bad = batch(0)
    bad["moments"] = torch.full_like(bad["moments"], torch.nan)
    assert made.train_step([bad], 2, 1e-2).applied == 0
    assert all(torch.equal(one, other) for one, other in zip(before, made.model.parameters(), strict=True))
    fresh.model.load_state_dict(made.model.state_dict())
    for kind in STATES:
        state = dict(made.full_state(kind))
        fresh.load_full_state(kind, state.__getitem__)
    set_applied_steps(fresh._optimizer, 2)
    assert losses(fresh) == losses(made)
    for model in (made.model, fresh.model):
        shadowed = [weight for weight in model.parameters() if hasattr(weight, "shadow")]
        assert shadowed
        assert all(torch.equal(weight.shadow, weight.bfloat16()) for weight in shadowed)


def test_no_weight_of_a_linear_layer_is_cast():
    class Casts(_Count):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ == "_to_copy" and (kwargs or {}).get("dtype") is torch.bfloat16:
                cast.append(args[0].data_ptr())
            return super().__torch_dispatch__(func, types, args, kwargs)

    cast, made = [], engine()
    losses(made, 1)
    with Casts():
        losses(made, 1)
    mine = {w.data_ptr(): name for name, w in made.model.named_parameters() if hasattr(w, "shadow")}
    assert [mine[address] for address in cast if address in mine] == []


def test_compiled_blocks_read_them_too():
    torch.testing.assert_close(losses(engine(compile=True)), losses(engine()), rtol=1e-2, atol=0)


def test_the_modulations_of_all_blocks_are_one_product_and_their_gradients_two(monkeypatch):
    products, together, apart = [], engine(), engine()

    class Products(_Count):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("mm", "addmm") and any(rows in x.shape for x in args):
                products.append(func.overloadpacket.__name__)
            return super().__torch_dispatch__(func, types, args, kwargs)

    rows = sum(layer.out_features for layer in together.model.side_by_side())
    together._in_backward = apart._in_backward = True
    with Products():
        first, _ = together.loss(batch(0), 0)
        first.backward()
    monkeypatch.setattr(SiT, "_modulations", lambda self, c: {})
    second, _ = apart.loss(batch(0), 0)
    second.backward()
    assert torch.equal(first, second)
    assert products == ["addmm", "mm", "mm"]
    pairs = zip(together.model.named_parameters(), apart.model.parameters(), strict=True)
    moved = [name for (name, mine), other in pairs if mine.requires_grad and not torch.equal(mine.grad, other.grad)]
    assert moved
    assert all(name.startswith(("t_embedder.", "y_embedder.")) for name in moved)
    for (_, mine), other in zip(together.model.named_parameters(), apart.model.parameters(), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, other.grad, rtol=2e-2, atol=2e-2 * other.grad.abs().max().item())
