"""Calls that an op does not know, and parts that change after `apply`: the class's own forward runs, and says so."""

import copy
import logging
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune

from dit_fast import _C, patch
from dit_fast.errors import UserError
from tests.helpers.cases import loop_over
from tests.helpers.published_models import Attention, Block, FinalLayer, Mlp, Transformer, inputs, leaves


class RopeBlock(Block):
    """LightningDiT's signature, with names of its own."""

    def forward(self, tokens, cond, feat_rope=None):
        out = super().forward(tokens, cond)
        return out if feat_rope is None else out + feat_rope


class AnyBlock(Block):
    def forward(self, x, *conditions, **options):
        out = super().forward(x, conditions[0] if conditions else options["c"])
        return out * options.get("gain", 1)


class BroadBlock(Block):
    """Takes a condition for all samples, one for each, or one for each token; and none."""

    def forward(self, x, c=None):
        c = x.new_zeros(1, x.shape[-1]) if c is None else c
        parts = self.adaLN_modulation(c).chunk(6, dim=-1)
        parts = [part.unsqueeze(1) if part.dim() == 2 else part for part in parts]
        x = x + parts[2] * self.attn(self.norm1(x) * (1 + parts[1]) + parts[0])
        return x + parts[5] * self.mlp(self.norm2(x) * (1 + parts[4]) + parts[3])


class RopeAttention(Attention):
    def forward(self, x, rope=None, *, scale=1.0):
        return super().forward(x if rope is None else x + rope) * scale


class MaskedMlp(Mlp):
    def forward(self, x, mask=None, **options):
        return super().forward(x) * options.get("gain", 1) * (1 if mask is None else mask)


class TokenFinal(FinalLayer):
    def forward(self, x, c, skip_norm=False):
        return self.linear(x) if skip_norm else super().forward(x, c)


def _single(module):
    """The module patched, and its twin as it was."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"only": module})
    for parameter in holder.parameters():
        nn.init.normal_(parameter, std=0.2)
    twin = copy.deepcopy(module)
    assert patch.apply(holder, ops=patch.OPS).report.replaced["only"]
    return module, twin


def _same(ours, theirs, rtol=1e-4, atol=1e-5):
    for left, right in zip(leaves(ours), leaves(theirs), strict=True):
        torch.testing.assert_close(left, right, rtol=rtol, atol=atol)


def _near(ours, theirs, tolerance):
    """Half precision: single elements may differ by more, the norm of the difference may not."""
    assert (ours - theirs).double().norm() <= tolerance * theirs.double().norm()


N, T, D = 2, 5, 32
X, C, EACH = torch.randn(3, N, T, D, generator=torch.Generator().manual_seed(0)).unbind(0)
C = C[:, 0]


@pytest.mark.parametrize(
    ("build", "positional", "named", "taken"),
    [
        (lambda: RopeBlock(D, 4, False), (X, C), {}, True),
        (lambda: RopeBlock(D, 4, False), (X, C, None), {}, True),
        (lambda: RopeBlock(D, 4, False), (X,), {"cond": C, "feat_rope": None}, True),
        (lambda: RopeBlock(D, 4, False), (X, C, EACH), {}, False),
        (lambda: RopeBlock(D, 4, False), (X,), {"cond": C, "feat_rope": EACH}, False),
        (lambda: AnyBlock(D, 4, False), (X, C), {}, True),
        (lambda: AnyBlock(D, 4, False), (X,), {"c": C}, False),
        (lambda: AnyBlock(D, 4, False), (X, C), {"gain": 2}, False),
        (lambda: BroadBlock(D, 4, False), (X, C), {}, True),
        (lambda: BroadBlock(D, 4, False), (X, C[:1]), {}, False),
        (lambda: BroadBlock(D, 4, False), (X, EACH), {}, False),
        (lambda: BroadBlock(D, 4, False), (X,), {}, False),
        (lambda: RopeAttention(D, 4, True), (X,), {"scale": 1.5}, False),
        (lambda: RopeAttention(D, 4, True), (X, EACH), {}, False),
        (lambda: MaskedMlp(D), (X[0],), {"mask": None}, True),
        (lambda: MaskedMlp(D), (X, EACH), {"gain": 3}, False),
        (lambda: TokenFinal(D, 8), (X, C), {"skip_norm": True}, False),
    ],
)
def test_a_call_gets_the_result_of_the_classs_own_forward(build, positional, named, taken, caplog):
    module, twin = _single(build())
    with caplog.at_level(logging.WARNING, "dit_fast"):
        for _ in range(2):
            _same(module(*positional, **named), twin(*positional, **named))
    assert [f"{type(module).__name__} runs its own forward" in line for line in caplog.messages] == [True] * (not taken)


def test_a_call_that_the_class_refuses_gets_its_own_error():
    module, twin = _single(RopeBlock(D, 4, False))
    for positional, named in (((X,), {}), ((X, C), {"tokens": X}), ((X, C), {"rope": 1}), ((X, C, None, None), {})):
        for one in (module, twin):
            with pytest.raises(TypeError, match=r"RopeBlock\.forward"):
                one(*positional, **named)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_ragged_tokens_get_the_classs_own_forward():
    tokens = torch.nested.nested_tensor([X[0], X[1, :3]], layout=torch.jagged)
    for build, more in ((lambda: Mlp(D), ()), (lambda: FinalLayer(D, 8), (C,))):
        module, twin = _single(build())
        torch.testing.assert_close(module(tokens, *more).values(), twin(tokens, *more).values())
    module, twin = _single(Mlp(D))
    tokens = torch.nested.nested_tensor([X[0], X[1, :3]])  # of strided layout
    for ours, theirs in zip(module(tokens).unbind(), twin(tokens).unbind(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_torch_jit_traces_the_classs_own_forward():
    x, t, y = inputs()
    model = Transformer("sit").eval()
    twin = copy.deepcopy(model)
    patch.apply(model)
    _same(torch.jit.trace(model, (x, t, y))(x, t, y), twin(x, t, y))


def _prune(model):
    prune.l1_unstructured(model.blocks[0].mlp.fc1, "weight", 0.5)
    return "fc1 has hooks"


def _spectral_norm(model):
    parametrizations.spectral_norm(model.blocks[0].mlp.fc2)
    return "fc2 became .*ParametrizedLinear"


def _old_weight_norm(model):
    nn.utils.weight_norm(model.blocks[0].mlp.fc1)
    return "fc1 has hooks"


def _adapter(model):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down = base, nn.Linear(base.in_features, base.out_features)

        def forward(self, x):
            return self.base(x) + self.down(x)

    model.blocks[0].mlp.fc1 = Adapter(model.blocks[0].mlp.fc1)
    return "fc1 became .*Adapter"


def _quantised(model):
    torch.ao.quantization.quantize_dynamic(model.blocks[0].mlp, {nn.Linear}, torch.qint8, inplace=True)
    return "fc1 became .*quantized"


def _hook(model):
    model.blocks[0].norm1.register_forward_hook(lambda module, given, out: 2 * out)
    return "norm1 has hooks"


def _dropout(model):
    model.blocks[0].mlp.drop1.p = 0.5
    return "drop1 p changed"


def _affine(model):
    model.blocks[0].norm2 = nn.LayerNorm(D, eps=1e-6)
    nn.init.normal_(model.blocks[0].norm2.weight)
    return "norm2 elementwise_affine changed"


def _own_forward(model):
    model.blocks[0].mlp.act.forward = F.relu
    return "act has a forward of its own"


def _other_activation(model):
    model.blocks[0].mlp.act.approximate = "none"
    return "act approximate changed"


def _class_forward(model):
    model.blocks[0].mlp.__class__ = type("Doubled", (Mlp,), {"forward": lambda self, x: 2 * Mlp.forward(self, x)})
    return "another forward now"


def _skip_hook(model):
    model.skip_linears[0].linear.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    return "skip_linears.0.linear has hooks"


CHANGES = (_prune, _spectral_norm, _old_weight_norm, _adapter, _quantised, _hook, _dropout, _affine, _own_forward)
CHANGES += (_other_activation, _class_forward, _skip_hook)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_after_apply_takes_effect_and_is_named(change, caplog):
    torch.manual_seed(0)
    model = Transformer("input").train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    twin = copy.deepcopy(model)
    patch.apply(model, ops=patch.OPS)
    before = leaves(model(*inputs()))[0]
    results = []
    for one in (model, twin):
        torch.manual_seed(1)
        reason = change(one)
        torch.manual_seed(2)
        with caplog.at_level(logging.WARNING, "dit_fast"):
            results.append(one(*inputs()))
    _same(*results)
    assert not torch.allclose(before, leaves(results[0])[0], rtol=1e-3)
    (message,) = caplog.messages
    assert re.search(reason, message)


def test_hooks_on_all_modules_run(caplog):
    model = Transformer("sit", depth=1)
    patch.apply(model, ops=patch.OPS)
    seen = []
    with caplog.at_level(logging.WARNING, "dit_fast"):
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
        try:
            model(*inputs())
        finally:
            handle.remove()
    assert {"LayerNorm", "GELU"} <= set(seen)
    assert "hooks on all modules" in caplog.messages[0]


@loop_over("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@loop_over(("batch", "tokens", "size"), [(1, 1, 1e-3), (3, 256, 1e3), (1, 256, 1.0)])
def test_inputs_that_occur(dtype, batch, tokens, size):
    module, twin = (one.to(dtype) for one in _single(Block(D, 4, True)))
    torch.manual_seed(3)
    x = (size * torch.randn(tokens, batch, D)).to(dtype)
    c = torch.randn(batch, 2 * D).to(dtype)[:, ::2]
    weights = torch.randn(batch, tokens, D)
    results = []
    for one in (module, twin):
        one.adaLN_modulation.requires_grad_(False)
        one.mlp.fc1.weight.requires_grad_(False)
        given = x.clone().requires_grad_()
        out = one(given.transpose(0, 1), c)  # not contiguous
        (out.float() * weights).sum().backward()
        results.append((out, given.grad, one.mlp.fc1.bias.grad, one.attn.qkv.weight.grad))
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        _near(ours, theirs, tolerance)


def test_a_head_in_fp32_after_blocks_in_bf16():
    module, twin = _single(FinalLayer(D, 8))
    _near(module(X.bfloat16(), C), twin(X.bfloat16(), C), 2e-2)
    block, plain = _single(Block(D, 4, False))
    for one in (block, plain):  # maps in bf16, conditioning in fp32
        for part in (one.attn, one.mlp):
            part.bfloat16().register_forward_pre_hook(lambda module, given: (given[0].bfloat16(),))
    _near(block(X.bfloat16(), C), plain(X.bfloat16(), C), 2e-2)


def test_autocast_with_parameters_of_two_dtypes():
    module, twin = _single(Mlp(D))
    for one in (module, twin):
        one.fc2.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        _near(module(X), twin(X), 2e-2)


@pytest.mark.skipif(_C.unavailable() is not None, reason="needs the C++ operators")
def test_transforms_are_right_or_refused():
    """torch.func.grad and reverse mode once: right. vmap and second derivatives: an error that names the op."""
    model = Transformer("input", depth=2, qk_norm=True).eval()
    twin = copy.deepcopy(model)
    patch.apply(model, ops=patch.OPS)
    x, t, y = inputs()

    def loss(one, parameters, x):
        return torch.func.functional_call(one, parameters, (x, t, y))["x"].square().sum()

    parameters = dict(twin.named_parameters())
    ours, theirs = (torch.func.grad(loss, 1)(one, parameters, x) for one in (model, twin))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="vmap over AdaLN"):
        torch.func.vmap(lambda one: model(one[None], t[:1], y[:1])["x"])(x)
    x.requires_grad_()
    (first,) = torch.autograd.grad(loss(model, {}, x), x, create_graph=True)
    with pytest.raises(UserError, match="no second derivative"):
        torch.autograd.grad(first.square().sum(), x)


def test_sharded_first_is_named_and_sharded_later_runs(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        first, later, model = (Transformer("sit", depth=1).eval() for _ in range(3))
        for one in (first, later):
            one.load_state_dict(model.state_dict())
        fully_shard(first, mesh=mesh)
        with pytest.raises(UserError, match="is a DTensor, not a plain tensor; apply the patch before sharding"):
            patch.apply(first)
        patch.apply(later)
        for part in (later.blocks[0].mlp.fc1, later.blocks[0], later):
            fully_shard(part, mesh=mesh)
        _same(later(*inputs()), model(*inputs()))
    finally:
        torch.distributed.destroy_process_group()
