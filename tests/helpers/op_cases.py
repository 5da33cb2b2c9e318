"""Every op of the package, in the tables that the tests of all ops go through. A new op has its lines here.

CALLS, SHAPES: public ops of tensors that may need gradients, called with such tensors alone; forms of an op come after
its name. FUSED: what carries their
kernels' gradients and tangents. NAMED: every public function with its arguments by name. REGISTERED: every op that
torch knows, by its name there.
"""

import functools

import pytest
import torch

from dit_fast import _C, ops
from dit_fast.ops import adaln, diversity_op, flow
from dit_fast.ops.diversity_terms import forward_op as terms_op
from dit_fast.ops.long_skip import forward_op as long_skip_forward_op
from dit_fast.ops.qk_norm import _fused as fused_qk_norm
from dit_fast.ops.repa_cosine import _fused as fused_cosine

N, T, D = 2, 3, 4
STREAM, VECTOR = (N, T, D), (N, D)
F32, BF16 = torch.float32, torch.bfloat16
COSINES, SINES = torch.randn(2, T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TIMES, POSITIONS = torch.tensor([0.3, 0.6], dtype=torch.float64), torch.arange(N)


def tapped(*features, backend="auto"):
    taps = ops.DiversityTaps(backend)
    for feature in features:
        taps.tap(feature)
    return taps.loss().total


def flattened(features):
    return [feature.flatten(0, 1) for feature in features]


def stats_flat(*features, backend="auto"):
    stats = ops.diversity_stats(features, backend)
    return torch.cat([stats.sums, stats.abs_sums, stats.square_sums, stats.pair_sums], 1)


def fused_heads(qkv, *arguments):
    return torch.cat(fused_qk_norm(qkv, 2, *arguments, "torch")).transpose(1, 2)


SHAPES = {
    "layer_norm_modulate": [STREAM, VECTOR, VECTOR],
    "gate_residual": [STREAM, STREAM, VECTOR],
    "gate_residual_modulate": [STREAM, STREAM, VECTOR, VECTOR, VECTOR],
    "layer_norm_modulate scale": [STREAM, VECTOR],
    "layer_norm_modulate tokens": [STREAM, STREAM, STREAM],
    "gate_residual_modulate rms scale": [STREAM, STREAM, VECTOR, VECTOR],
    "qk_norm rotary": [(N, T, 6 * D)],
    "qk_norm rms rotary": [(N, T, 6 * D), (D,), (D,)],
    "long_skip": [STREAM, STREAM, (2 * D,), (2 * D,), (D, 2 * D), (D,)],
    "qk_norm": [(N, T, 6 * D), (D,), (D,), (D,), (D,)],
    "gelu_mlp": [STREAM, (5, D), (5,), (D, 5), (D,)],
    "repa_cosine": [STREAM, STREAM],
    "flow_noised": [STREAM],
    "flow_error": [STREAM, STREAM],
    "diversity_stats": [STREAM] * 3,
    "diversity_loss": [STREAM] * 3,
}
CALLS = {
    "layer_norm_modulate": ops.layer_norm_modulate,
    "layer_norm_modulate rms": functools.partial(ops.layer_norm_modulate, norm="rms"),
    "layer_norm_modulate scale": lambda x, scale, **options: ops.layer_norm_modulate(x, None, scale, **options),
    "layer_norm_modulate tokens": ops.layer_norm_modulate,
    "gate_residual": ops.gate_residual,
    "gate_residual_modulate rms scale": lambda x, y, gate, scale, **options: torch.cat(
        ops.gate_residual_modulate(x, y, gate, None, scale, norm="rms", **options)
    ),
    "gate_residual_modulate": lambda *x, **options: torch.cat(ops.gate_residual_modulate(*x, **options)),
    "long_skip": ops.long_skip,
    "qk_norm": lambda qkv, *x, **options: torch.cat(ops.qk_norm(qkv, 2, *x, **options)),
    "qk_norm rotary": lambda qkv, **options: torch.cat(
        ops.qk_norm(qkv, 2, None, None, None, None, norm="none", rotary=(COSINES, SINES), **options)
    ),
    "qk_norm rms rotary": lambda qkv, q, k, **options: torch.cat(
        ops.qk_norm(qkv, 2, q, None, k, None, norm="rms", rotary=(COSINES, SINES), **options)
    ),
    "gelu_mlp": ops.gelu_mlp,
    "repa_cosine": ops.repa_cosine,
    "flow_noised": lambda x, **options: ops.flow_noised(x, TIMES, POSITIONS, 7, **options),
    "flow_error": lambda *x, **options: ops.flow_error(*x, TIMES, POSITIONS, 7, **options),
    "diversity_stats": stats_flat,
    "diversity_loss": lambda *x, **options: ops.diversity_loss(x, **options).total,
}
REFERENCES = {name: functools.partial(call, backend="torch") for name, call in CALLS.items()}
# What carries the kernels' gradients and tangents; in float64 plain torch stands where the kernels are called.
FUSED = {
    "layer_norm_modulate": lambda x, shift, scale: adaln._fused(
        x, None, None, shift, scale, None, None, 1e-6, False, x.dtype, True, "torch", False
    )[1],
    "layer_norm_modulate rms": lambda x, shift, scale: adaln._fused(
        x, None, None, shift, scale, None, None, 1e-6, True, x.dtype, True, "torch", False
    )[1],
    "layer_norm_modulate scale": lambda x, scale: adaln._fused(
        x, None, None, None, scale, None, None, 1e-6, False, x.dtype, True, "torch", False
    )[1],
    "gate_residual_modulate": lambda *x: torch.cat(
        adaln._fused(*x, None, None, 1e-6, False, x[0].dtype, True, "torch", False)[:2]
    ),
    "gate_residual_modulate rms scale": lambda x, y, gate, scale: torch.cat(
        adaln._fused(x, y, gate, None, scale, None, None, 1e-6, True, x.dtype, True, "torch", False)[:2]
    ),
    "long_skip": lambda *x: ops.long_skip(*x, backend="gemm"),
    "qk_norm": lambda qkv, *x: fused_heads(qkv, *x, None, None, 1e-5, "layer"),
    "qk_norm rms rotary": lambda qkv, q, k: fused_heads(qkv, q, None, k, None, COSINES, SINES, 1e-5, "rms"),
    "gelu_mlp": lambda *x: ops.gelu_mlp(*x, backend="recompute"),
    "repa_cosine": lambda p, q: fused_cosine(p.flatten(0, 1), q.flatten(0, 1), "torch")[0],
    "flow_error": lambda p, x: flow._fused_error(p.flatten(1), x.flatten(1), TIMES, POSITIONS, 7, "linear", "torch"),
    "diversity_stats": lambda *x: torch.cat([y.flatten() for y in diversity_op.statistics("torch", flattened(x))]),
    "diversity_loss taps": tapped,
}


def inputs(name):
    generator, shapes = torch.Generator().manual_seed(len(name)), SHAPES.get(name) or SHAPES[name.split()[0]]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


TOKENS, ROW = torch.randn(2, 3, 8), torch.randn(2, 8)
NAMED = {
    ops.layer_norm_modulate: {"x": TOKENS, "shift": ROW, "scale": ROW},
    ops.gate_residual: {"x": TOKENS, "y": TOKENS, "gate": ROW},
    ops.gate_residual_modulate: {"x": TOKENS, "y": TOKENS, "gate": ROW, "shift": ROW, "scale": ROW},
    ops.row_statistics: {"x": TOKENS},
    ops.long_skip: {
        "x": TOKENS,
        "skip": TOKENS,
        "norm_weight": torch.ones(16),
        "norm_bias": torch.ones(16),
        "weight": torch.ones(8, 16),
        "bias": torch.ones(8),
    },
    ops.gelu_mlp: {
        "x": TOKENS,
        "fc1_weight": torch.ones(4, 8),
        "fc1_bias": torch.ones(4),
        "fc2_weight": torch.ones(8, 4),
        "fc2_bias": torch.ones(8),
    },
    ops.qk_norm: {
        "qkv": torch.randn(2, 3, 24),
        "num_heads": 2,
        **{name: torch.ones(4) for name in ("q_weight", "q_bias", "k_weight", "k_bias")},
    },
    ops.repa_cosine: {"prediction": TOKENS, "target": TOKENS},
    ops.flow_noised: {"latents": TOKENS, "t": torch.rand(2), "positions": torch.arange(2), "seed": 0},
    ops.flow_error: {
        "prediction": TOKENS,
        "latents": TOKENS,
        "t": torch.rand(2),
        "positions": torch.arange(2),
        "seed": 0,
    },
    ops.diversity_stats: {"features": [TOKENS, TOKENS]},
    ops.diversity_loss: {"features": [TOKENS, TOKENS]},
    ops.diversity_tap: {"x": TOKENS},
}


MAY_BE_NONE = {(ops.layer_norm_modulate, "shift"), (ops.gate_residual_modulate, "shift")}


def new(*shape):
    return torch.randn(shape).requires_grad_()


def long_skip_parameters():
    return new(32), new(32), new(16, 32), new(16)


def long_skip_forward():
    """Products in bf16 and a width that the kernels take."""
    return new(5, 16), new(5, 16), *long_skip_parameters(), *[None] * 7, 1e-6, BF16, F32, "gemm"


def long_skip_backward():
    with torch.no_grad():
        saved = long_skip_forward_op(*long_skip_forward())
    saved = [x.requires_grad_() for x in saved]
    return new(5, 16), *saved, *long_skip_forward()[:6], *[None] * 3, BF16, [True] * 6, "gemm"


def diversity_backward():
    with torch.no_grad():
        norms = diversity_op.forward_op([new(6, 8), new(6, 8)], False, "torch")[2]
    return [new(6, 8), new(6, 8)], norms.requires_grad_(), None, new(3, 2, 8), new(2, 2), [], [0, 1], "torch"


def diversity_terms():
    """Of two blocks of five tokens."""
    x = torch.randn(2, 5, 8)
    statistics = torch.stack([x.sum(1), x.abs().sum(1), x.square().sum(1)]).requires_grad_()
    return statistics, new(2, 2), new(2, 2), torch.ones(2).requires_grad_(), torch.tensor(5.0, requires_grad=True)


def diversity_terms_backward():
    known = diversity_terms()
    with torch.no_grad():
        gram, usage = terms_op(*known, True, "torch")[4:]
    return *known, gram.requires_grad_(), usage.requires_grad_(), new(), None, new(), None, True, "torch"


def compiled(x):
    """x, where the compiled CPU library is there; loads it."""
    if reason := _C.unavailable():
        pytest.skip(reason)
    return x


# Draws without padding: it holds anything, and results are compared whole.
REGISTERED = {
    "attention_forward": lambda: (new(2, 3, 96), 2),
    "attention_backward": lambda: (new(2, 3, 32), new(2, 3, 96), new(2, 3, 32), new(2, 2, 3), 2),
    "draws": lambda: (torch.arange(4), 3, [True, False], [4, 2**31], [5, 1], "torch"),
    "adaln_forward": lambda: (
        new(*STREAM), new(*STREAM), new(*VECTOR), new(*VECTOR), new(*VECTOR), None, None, 1e-6, False, F32, True,
        "torch",
    ),
    "adaln_backward": lambda: (
        *(new(*STREAM) for _ in range(4)), new(*VECTOR), new(*VECTOR), new(2, 3), torch.ones(2, 3).requires_grad_(),
        1e-6, True, True, F32, F32, F32, F32, "torch",
    ),
    "diversity_forward": lambda: ([new(6, 8), new(6, 8)], True, "torch"),
    "diversity_backward": diversity_backward,
    "diversity_tap_backward": lambda: (*(new(*STREAM) for _ in range(3)), new(*VECTOR), "torch"),
    "diversity_terms": lambda: (*diversity_terms(), True, "torch"),
    "diversity_terms_backward": diversity_terms_backward,
    "flow_noised": lambda: (new(4, 8), torch.rand(4), torch.arange(4), 3, "linear", "torch"),
    "flow_error": lambda: (new(4, 8), new(4, 8), torch.rand(4), torch.arange(4), 3, "linear", "torch"),
    "flow_error_backward": lambda: (
        new(4), new(4, 8), new(4, 8), torch.rand(4), torch.arange(4), 3, "linear", [True, True], "torch"
    ),
    "joined_sum": lambda: ([new(5, 8), new(5, 8)], "torch"),
    "gelu_backward": lambda: (new(5, 8), new(5, 6), new(6, 8), True, True, "recompute"),
    "long_skip_forward": long_skip_forward,
    "long_skip_fold": lambda: ([new(16, 32).bfloat16(), new(16), new(16)], list(long_skip_parameters()), "gemm"),
    "long_skip_backward": long_skip_backward,
    "qk_norm_forward": lambda: (new(2, 3, 24), *(new(4) for _ in range(4)), None, None, 2, 1e-5, "layer", "torch"),
    "qk_norm_backward": lambda: (
        *(new(2, 3, 2, 4) for _ in range(3)), new(2, 3, 24), new(4), new(4), torch.randn(3, 4), torch.randn(3, 4), 1e-5,
        "rms", False, True, True, "torch",
    ),
    "repa_cosine_forward": lambda: (new(5, 8), new(5, 8), "torch"),
    "repa_cosine_backward": lambda: (new(), new(5, 8), new(5, 8), new(3, 5), [True, True], "torch"),
    "row_statistics": lambda: (new(5, 8), "torch"),
    # These three have no other form; last, since a machine without the library skips them.
    "column_sums": lambda: (compiled(new(5, 8)),),
    "gelu": lambda: (compiled(new(5, 8)),),
    "product": lambda: (compiled(new(5, 8)), new(8, 16), new(16)),
}  # fmt: skip
