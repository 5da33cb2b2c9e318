import pytest
import torch

from dit_fast.errors import ConfigError, UserError
from dit_fast.ops import gate_residual, gate_residual_modulate, layer_norm_modulate
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close


def _inputs(n=2, t=5, d=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n + t + d)
    sizes = [(n, t, d), (n, t, d), (n, d), (n, d), (n, d)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def _norm(x, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


@loop_over("sizes", [(2, 5, 6), (1, 1, 3), (3, 16, 160)])
def test_match_the_equations(sizes):
    x, y, gate, shift, scale = _inputs(*sizes)
    x_new = x + gate[:, None] * y
    modulated = _norm(x_new) * (1 + scale[:, None]) + shift[:, None]
    assert_close(layer_norm_modulate(x, shift, scale), _norm(x) * (1 + scale[:, None]) + shift[:, None], 1e-13)
    assert_close(gate_residual(x, y, gate), x_new, 1e-15)
    ours = gate_residual_modulate(x, y, gate, shift, scale)
    assert_close(ours[0], x_new, 1e-15)
    assert_close(ours[1], modulated, 1e-13)
    single = gate_residual_modulate(*_inputs(*sizes, dtype=torch.float32))
    assert_close(single[1], modulated, 2e-6)


def _rms(x, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@loop_over("tokens", [False, True])
@loop_over("form", [("layer", _norm), ("rms", _rms)])
def test_forms_of_the_norm_and_of_the_modulation(form, tokens):
    """LayerNorm or RMSNorm, with or without shift, vectors for each sample or for each token."""
    name, norm = form
    x, y, *vectors = _inputs()
    gate, shift, scale = [v[:, None].repeat(1, x.shape[1], 1) + y.cos() for v in vectors] if tokens else vectors
    wide_gate, wide_shift, wide_scale = (v if tokens else v[:, None] for v in (gate, shift, scale))
    x_new = x + wide_gate * y
    for given, added in ((shift, wide_shift), (None, 0)):
        ours = gate_residual_modulate(x, y, gate, given, scale, norm=name)
        assert_close(ours[0], x_new, 1e-15)
        assert_close(ours[1], norm(x_new) * (1 + wide_scale) + added, 1e-13)
        alone = layer_norm_modulate(x_new, given, scale, norm=name)
        assert torch.equal(alone, ours[1])
    assert torch.equal(gate_residual(x, y, gate), ours[0])


def test_the_weight_of_an_rms_norm_folds_into_the_scale():
    x, _, weights, _, scale = _inputs(dtype=torch.float32)
    weight = weights[0]
    ours = layer_norm_modulate(x, None, torch.addcmul(weight - 1, weight, scale), norm="rms")
    assert_close(ours, weight.double() * _rms(x.double()) * (1 + scale.double()[:, None]), 1e-6)


def test_gradients_and_forward_mode():
    x, y, gate, shift, scale = (tensor.requires_grad_() for tensor in _inputs(2, 3, 4))
    assert torch.autograd.gradcheck(layer_norm_modulate, (x, shift, scale), check_forward_ad=True)
    assert torch.autograd.gradcheck(gate_residual, (x, y, gate), check_forward_ad=True)
    assert torch.autograd.gradcheck(gate_residual_modulate, (x, y, gate, shift, scale), check_forward_ad=True)


def test_strided_inputs_as_the_block_passes_them():
    x, y, *_ = _inputs(4, 5, 6)
    modulation = torch.randn(4, 18, dtype=torch.float64)
    gate, shift, scale = modulation.chunk(3, dim=1)
    assert not gate.is_contiguous()
    expected = gate_residual_modulate(x, y, gate.contiguous(), shift.contiguous(), scale.contiguous())
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    for ours, reference in zip(gate_residual_modulate(transposed, y, gate, shift, scale), expected, strict=True):
        assert_close(ours, reference, 1e-14)


@loop_over("stream", [torch.float32, torch.bfloat16, torch.float16])
@loop_over("branch", [torch.float32, torch.bfloat16])
def test_results_keep_the_dtype_of_the_stream_and_round_once(stream, branch):
    x, y, gate, shift, scale = _inputs(dtype=torch.float32)
    x = (x + 32).to(stream)
    y, gate, shift, scale = (tensor.to(branch) for tensor in (y, gate, shift, scale))
    x_new, out = gate_residual_modulate(x, y, gate, shift, scale)
    assert x_new.dtype == out.dtype == stream
    exact = x.double() + gate.double()[:, None] * y.double()
    step = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}[stream]
    assert_close(x_new, exact, step)
    assert_close(out, _norm(x_new.double()) * (1 + scale.double()[:, None]) + shift.double()[:, None], max(step, 1e-5))


def test_eps_reaches_the_norm():
    x, y, gate, shift, scale = _inputs()
    expected = _norm(x, 0.5) * (1 + scale[:, None]) + shift[:, None]
    assert_close(layer_norm_modulate(x, shift, scale, eps=0.5), expected, 1e-13)
    fused = gate_residual_modulate(x, y, 0 * gate, shift, scale, eps=0.5)
    assert_close(fused[1], expected, 1e-13)


def test_bad_input_is_one_line_that_names_it():
    x, y, gate, shift, scale = _inputs()
    cases = [
        (lambda: layer_norm_modulate(x[0], shift, scale), "x must be"),
        (lambda: layer_norm_modulate(x, shift[:1], scale), "shift"),
        (lambda: layer_norm_modulate(x, shift, scale[:, :-1]), "scale"),
        (
            lambda: layer_norm_modulate(x, shift, scale[:, None]),
            r"scale must be \[N, D\] = .* or \[N, T, D\] = \[2, 5, 6\]",
        ),
        (lambda: layer_norm_modulate(x, shift, scale, norm="batch"), "norm must be one of layer, rms, not 'batch'"),
        (lambda: gate_residual(x, y[:, :-1], gate), "y "),
        (lambda: gate_residual(x, y, gate[:, None]), "gate"),
        (lambda: gate_residual_modulate(x, y, gate, shift, scale.long()), "scale must be floating"),
        (lambda: gate_residual_modulate(x, y, gate.to("meta"), shift, scale), "gate is on meta"),
    ]
    for call, named in cases:
        with pytest.raises(UserError, match=named) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_unknown_backend_lists_the_valid_ones():
    x, y, gate, shift, scale = _inputs()
    for call in (
        lambda: layer_norm_modulate(x, shift, scale, backend="cudnn"),
        lambda: gate_residual(x, y, gate, backend="cudnn"),
        lambda: gate_residual_modulate(x, y, gate, shift, scale, backend="cudnn"),
    ):
        with pytest.raises(ConfigError, match="torch"):
            call()
