"""AdamW with the EMA as a state: parity with torch and with a plain EMA, closed forms, named optimizers."""

import copy

import pytest
import torch
from torch import nn

from dit_fast.errors import ConfigError
from dit_fast.runs import OptimizerConfig
from dit_fast.train.optim import (
    AdamWEMA,
    applied_steps,
    build_optimizer,
    init_states,
    learning_rate,
    set_applied_steps,
)


def _net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 3))
    net[0].bias.requires_grad_(False)
    return net


def _trained(net):
    return [p for p in net.parameters() if p.requires_grad]


def _gradients(net, step):
    generator = torch.Generator().manual_seed(step)
    for p in net.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
def test_equals_torch_adamw_and_a_plain_ema(weight_decay, betas):
    ours, theirs = _net(), _net()
    options = {"lr": 3e-3, "betas": betas, "eps": 1e-8, "weight_decay": weight_decay}
    first = AdamWEMA([p for p in ours.parameters() if p.requires_grad], ema_decay=0.9, **options)
    second = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **options)
    shadow = [p.detach().clone() for p in theirs.parameters()]
    for step in range(20):
        _gradients(ours, step)
        _gradients(theirs, step)
        first.step()
        second.step()
        for s, p in zip(shadow, theirs.parameters(), strict=True):
            s.mul_(0.9).add_(p.detach(), alpha=0.1)
    for p, q, s in zip(ours.parameters(), theirs.parameters(), shadow, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        if p.requires_grad:
            torch.testing.assert_close(first.state[p]["ema"], s, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(first.state[p]["exp_avg_sq"], second.state[q]["exp_avg_sq"], rtol=1e-6, atol=0)
    assert applied_steps(first) == 20


def test_flat_partition_gives_the_same_bits():
    """What ZeRO hands to the optimizer is one flat slice; the update is elementwise, so nothing may change."""
    net = _net()
    trainable = [p for p in net.parameters() if p.requires_grad]
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in trainable]))
    first, second = AdamWEMA(trainable, lr=1e-2), AdamWEMA([flat], lr=1e-2)
    for step in range(5):
        _gradients(net, step)
        flat.grad = torch.cat([p.grad.flatten() for p in trainable])
        first.step()
        second.step()
    assert torch.equal(torch.cat([p.detach().flatten() for p in trainable]), flat.detach())
    assert torch.equal(torch.cat([first.state[p]["ema"].flatten() for p in trainable]), second.state[flat]["ema"])


def test_ema_closed_form_and_weights_without_gradient():
    weight, idle = nn.Parameter(torch.full((3,), 2.0)), nn.Parameter(torch.ones(2))
    optimizer = AdamWEMA([weight, idle], lr=0.0, ema_decay=0.9)
    init_states(optimizer)
    assert torch.equal(optimizer.state[weight]["ema"], torch.full((3,), 2.0))
    with torch.no_grad():
        weight.fill_(5.0)
    for _ in range(7):
        weight.grad = torch.ones(3)
        optimizer.step()
    expected = 2.0 * 0.9**7 + 5.0 * (1 - 0.9**7)
    torch.testing.assert_close(optimizer.state[weight]["ema"], torch.full((3,), expected), rtol=1e-6, atol=0)
    assert torch.equal(optimizer.state[idle]["ema"], torch.ones(2))
    assert optimizer.state[idle]["step"] == 0


def test_lists_follow_the_gradients_that_are_there_and_the_states_that_are_loaded():
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = AdamWEMA([first, second], lr=1e-2)
    counts = []
    for present in ([first, second], [second], [first, second], [first]):
        optimizer.zero_grad()
        for parameter in present:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        counts.append([int(optimizer.state[parameter]["step"]) for parameter in (first, second)])
    assert counts == [[1, 1], [1, 2], [2, 3], [3, 3]]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    assert [int(optimizer.state[parameter]["step"]) for parameter in (first, second)] == [4, 3]


@pytest.mark.parametrize("name", ["adamw", "torch_adamw", "torch_fused_adamw"])
def test_states_restored_before_the_first_step_continue_exactly(name):
    config = OptimizerConfig(name=name, lr=1e-2, ema_decay=0.9, weight_decay=0.01)
    whole, resumed = _net(), _net()
    first = build_optimizer(config, _trained(whole), "cpu")
    for step in range(3):
        _gradients(whole, step)
        first.step()
    resumed.load_state_dict(whole.state_dict())
    second = build_optimizer(config, _trained(resumed), "cpu")
    init_states(second)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        if p.requires_grad:
            for key in ("exp_avg", "exp_avg_sq", "ema"):
                second.state[q][key].copy_(first.state[p][key])
    set_applied_steps(second, applied_steps(first))
    for net, optimizer in ((whole, first), (resumed, second)):
        _gradients(net, 3)
        optimizer.step()
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
        if p.requires_grad:
            assert torch.equal(first.state[p]["ema"], second.state[q]["ema"])
            assert not torch.equal(first.state[p]["ema"], p)


def test_named_optimizers_agree():
    results = []
    for name in ("adamw", "torch_adamw", "torch_fused_adamw"):
        net = _net()
        optimizer = build_optimizer(OptimizerConfig(name=name, lr=1e-2, ema_decay=0.5), _trained(net), "cpu")
        for step in range(4):
            _gradients(net, step)
            optimizer.step()
        states = [optimizer.state[p]["ema"].flatten() for p in net.parameters() if p.requires_grad]
        results.append((torch.cat([p.detach().flatten() for p in net.parameters()]), torch.cat(states)))
    for weights, ema in results[1:]:
        torch.testing.assert_close(weights, results[0][0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(ema, results[0][1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["deepspeed_fused_adam", "apex_fused_adam"])
def test_what_cannot_run_here_says_why(name):
    with pytest.raises(ConfigError, match="CUDA devices only"):
        build_optimizer(OptimizerConfig(name=name), _net().parameters(), "cpu")


def test_pypi_apex_is_named_as_the_wrong_package():
    with pytest.raises(ConfigError, match="another project"):
        build_optimizer(OptimizerConfig(name="apex_fused_adam"), _net().parameters(), "cuda")


def test_learning_rate_warms_up_linearly():
    config = OptimizerConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(config, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate(OptimizerConfig(lr=2.0), 0) == 2.0
