"""The paths through flash-attn and apex, which no CI machine has, against stand-ins that check every call."""

import sys

import pytest
import torch

from dit_fast.nn import attention as attention_module
from dit_fast.nn.attention import Attention
from dit_fast.runs import OptimizerConfig
from dit_fast.train.optim import applied_steps, build_optimizer, init_states, set_applied_steps
from tests.helpers import stand_ins


@pytest.fixture
def flash(monkeypatch):
    module = stand_ins.flash_attn()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    attention_module.flash_attention.cache_clear()
    yield module
    attention_module.flash_attention.cache_clear()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_flash_attn_gets_the_layout_and_scale_of_plain_attention(flash, monkeypatch, qk_norm):
    monkeypatch.setattr(Attention, "_use_flash", lambda self, value: True)  # it asks for a tensor of a GPU
    torch.manual_seed(0)
    layer = Attention(48, 3, qk_norm=qk_norm, kind="flash").bfloat16()
    x = torch.randn(2, 5, 48).bfloat16()
    fast = layer(x)
    layer.kind = "math"
    assert flash.calls == [((2, 5, 3, 16), 0.25)]
    torch.testing.assert_close(fast, layer(x), atol=2e-2, rtol=2e-2)


def test_apex_gets_integer_steps_and_makes_the_updates_of_adamw(monkeypatch):
    for name, module in stand_ins.apex().items():
        monkeypatch.setitem(sys.modules, name, module)
    torch.manual_seed(0)
    weights = [torch.randn(4, 3), torch.randn(5)]
    runs = {}
    for name in ("adamw", "apex_fused_adam"):
        parameters = [torch.nn.Parameter(x.clone()) for x in weights]
        config = OptimizerConfig(name=name, lr=1e-2, weight_decay=0.1, ema_decay=0.9)
        optimizer = build_optimizer(config, parameters, "cuda")
        init_states(optimizer)
        set_applied_steps(optimizer, 7)  # as a resumed run does
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        assert applied_steps(optimizer) == 10
        states = [optimizer.state[p][key] for p in parameters for key in ("exp_avg", "exp_avg_sq", "ema")]
        runs[name] = [*(p.detach() for p in parameters), *states]
    assert sys.modules["apex.optimizers"].FusedAdam.calls == [8, 9, 10]
    torch.testing.assert_close(runs["apex_fused_adam"], runs["adamw"], atol=1e-6, rtol=1e-5)
