"""Every public op on small float64 tensors: the reference, and what carries the kernels' gradients and tangents."""

import functools

import torch

from dit_fast import ops
from dit_fast.ops import adaln, diversity_op, flow
from dit_fast.ops.qk_norm import _fused as fused_qk_norm
from dit_fast.ops.repa_cosine import _fused as fused_cosine

N, T, D = 2, 3, 4
STREAM, VECTOR = (N, T, D), (N, D)
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


SHAPES = {
    "layer_norm_modulate": [STREAM, VECTOR, VECTOR],
    "gate_residual": [STREAM, STREAM, VECTOR],
    "gate_residual_modulate": [STREAM, STREAM, VECTOR, VECTOR, VECTOR],
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
    "gate_residual": ops.gate_residual,
    "gate_residual_modulate": lambda *x, **options: torch.cat(ops.gate_residual_modulate(*x, **options)),
    "long_skip": ops.long_skip,
    "qk_norm": lambda qkv, *x, **options: torch.cat(ops.qk_norm(qkv, 2, *x, **options)),
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
        x, None, None, shift, scale, None, None, 1e-6, x.dtype, True, "torch"
    )[1],
    "gate_residual_modulate": lambda *x: torch.cat(adaln._fused(*x, None, None, 1e-6, x[0].dtype, True, "torch")[:2]),
    "long_skip": lambda *x: ops.long_skip(*x, backend="gemm"),
    "qk_norm": lambda qkv, *x: torch.cat(fused_qk_norm(qkv, 2, *x, 1e-5, "torch")).transpose(1, 2),
    "gelu_mlp": lambda *x: ops.gelu_mlp(*x, backend="recompute"),
    "repa_cosine": lambda p, q: fused_cosine(p.flatten(0, 1), q.flatten(0, 1), "torch")[0],
    "flow_error": lambda p, x: flow._fused_error(p.flatten(1), x.flatten(1), TIMES, POSITIONS, 7, "linear", "torch"),
    "diversity_stats": lambda *x: torch.cat([y.flatten() for y in diversity_op.statistics("torch", flattened(x))]),
    "diversity_loss taps": tapped,
}


def inputs(name):
    generator = torch.Generator().manual_seed(len(name))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES[name.split()[0]]]
