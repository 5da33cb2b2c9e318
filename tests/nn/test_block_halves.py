"""A block's halves as one node each: the ops' own bits, and op by op wherever something would be missed."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dit_fast.errors import UserError
from dit_fast.nn.block import Block
from dit_fast.nn.linear import make_shadows
from dit_fast.nn.mlp import SwiGLU
from dit_fast.ops import RowStatistics, branches
from dit_fast.ops.diversity_taps import DiversityTaps

WIDTH, HEADS = 32, 2
FORMS = {
    "plain": {},
    "normalised heads": {"qk_norm": True},
    "RMSNorm without shift": {"norm": "rms", "shift": False},
}


def block_of(**form):
    torch.manual_seed(0)
    block = Block(WIDTH, HEADS, **form)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    make_shadows(block, list(block.parameters()))
    return block


def inputs(block):
    torch.manual_seed(1)
    x, c = torch.randn(2, 8, WIDTH), torch.randn(2, WIDTH)
    return x.requires_grad_(), c.requires_grad_()


def everything(block, tapped=True, run=lambda call, *given: call(*given)):
    """Output, statistics and all gradients of two passes through a block."""
    x, c = inputs(block)
    taps, found, stream, stats = DiversityTaps(), [], x, None
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            stream, stats, *_ = run(block, stream, c, stats)
            found += [stream, stats.mean, stats.variance]
            if tapped:
                stream = taps.tap(stream, stats)
        loss = stream.square().mean() + (taps.loss("all").total if tapped else 0)
    grads = torch.autograd.grad(loss, [x, c, *block.parameters()], allow_unused=True)
    return [each.detach() for each in (*found, *grads) if each is not None]


@pytest.fixture
def nodes(monkeypatch):
    """How often a half ran as one node."""
    count = []
    for name in ("reads", "joins"):
        run = getattr(branches, name)
        counted = lambda *given, run=run, name=name, **named: count.append(name) or run(*given, **named)  # noqa: E731
        monkeypatch.setattr(branches, name, counted)
    return count


@pytest.fixture
def op_by_op(monkeypatch):
    return partial(monkeypatch.setattr, branches, "plan", lambda *given: None)


@pytest.mark.parametrize("tapped", [False, True], ids=["alone", "tapped"])
@pytest.mark.parametrize("form", FORMS)
def test_the_bits_are_those_of_the_ops(form, tapped, nodes, op_by_op):
    block = block_of(**FORMS[form])
    one = everything(block, tapped)
    assert nodes == ["reads", "joins"] * 2
    op_by_op()
    for ours, theirs in zip(one, everything(block, tapped), strict=True):
        assert torch.equal(ours, theirs)


def test_recomputation_gives_the_same_bits(nodes):
    block = block_of()
    plain = everything(block, False)
    again = everything(block, False, lambda call, *given: checkpoint(call, *given, use_reentrant=False))
    assert len(nodes) == 12
    assert all(map(torch.equal, plain, again))


def test_statistics_that_are_not_of_the_stream_are_refused(nodes):
    block = block_of()
    x, c = inputs(block)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match="mean must be"):
        block(x, c, RowStatistics(torch.zeros(2, 7), torch.zeros(2, 7)))


def test_a_second_derivative_is_refused():
    block = block_of()
    x, c = inputs(block)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = block(x, c)
    (grad,) = torch.autograd.grad(out.square().mean(), x, create_graph=True)
    with pytest.raises(UserError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), x)


def hook(block):
    block.attn.proj.register_forward_hook(lambda *_: None)


def freeze(block):
    block.mlp.fc1.weight.requires_grad_(False)


def forget(block):
    del block.attn.qkv.weight.shadow


def another_mlp(block):
    block.mlp = SwiGLU(WIDTH)


@pytest.mark.parametrize("change", [hook, freeze, forget, another_mlp])
def test_a_block_with_something_else_in_it_runs_op_by_op(change, nodes):
    block = block_of()
    change(block)
    x, c = inputs(block)
    with torch.autocast("cpu", torch.bfloat16):
        block(x, c)
    assert not nodes


def without_gradients(block, x, c):
    with torch.no_grad():
        block(x, c)


def counted(block, x, c):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        block(x, c)


def with_tangents(block, x, c):
    torch.func.jvp(lambda x: block(x, c)[0], (x.detach(),), (torch.ones_like(x),))


def in_single_precision(block, x, c):
    with torch.autocast("cpu", enabled=False):
        block(x, c)


@pytest.mark.parametrize("look", [without_gradients, counted, with_tangents, in_single_precision])
def test_op_by_op_where_someone_looks_on(look, nodes):
    block = block_of()
    x, c = inputs(block)
    with torch.autocast("cpu", torch.bfloat16):
        look(block, x, c)
    assert not nodes
