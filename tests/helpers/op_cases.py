"""Every public op on small float64 tensors: the reference, and what carries the kernels' gradients and tangents."""

import torch

from dit_fast import ops
from dit_fast.ops import adaln_op, flow_op
from dit_fast.ops.gelu_mlp import _GeluMlpWithTangent
from dit_fast.ops.qk_norm import _QkNormWithTangent
from dit_fast.ops.repa_cosine import _CosineWithTangent

N, T, D = 2, 3, 4
STREAM, VECTOR = (N, T, D), (N, D)
TIMES, POSITIONS = torch.tensor([0.3, 0.6], dtype=torch.float64), torch.arange(N)


def tapped(*features, backend="auto"):
    taps = ops.DiversityTaps(backend)
    for feature in features:
        taps.tap(feature)
    return taps.loss().total


def stats_flat(*features):
    stats = ops.diversity_stats(features, backend="torch")
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
REFERENCES = {
    "layer_norm_modulate": lambda *x: ops.layer_norm_modulate(*x, backend="torch"),
    "gate_residual": lambda *x: ops.gate_residual(*x, backend="torch"),
    "gate_residual_modulate": lambda *x: torch.cat(ops.gate_residual_modulate(*x, backend="torch")),
    "long_skip": lambda *x: ops.long_skip(*x, backend="torch"),
    "qk_norm": lambda qkv, *x: torch.cat(ops.qk_norm(qkv, 2, *x, backend="torch")),
    "gelu_mlp": lambda *x: ops.gelu_mlp(*x, backend="torch"),
    "repa_cosine": lambda *x: ops.repa_cosine(*x, backend="torch"),
    "flow_noised": lambda x: ops.flow_noised(x, TIMES, POSITIONS, 7, backend="torch"),
    "flow_error": lambda *x: ops.flow_error(*x, TIMES, POSITIONS, 7, backend="torch"),
    "diversity_stats": stats_flat,
    "diversity_loss": lambda *x: ops.diversity_loss(x, backend="torch").total,
}
# What carries the kernels' gradients and tangents; in float64 plain torch stands where the kernels are called.
FUSED = {
    "layer_norm_modulate": lambda x, shift, scale: adaln_op.apply(
        "layer_norm_modulate", x, None, None, shift, scale, None, 1e-6, x.dtype, True, "auto"
    )[1],
    "gate_residual_modulate": lambda *x: torch.cat(
        adaln_op.apply("gate_residual_modulate", *x, None, 1e-6, x[0].dtype, True, "auto")[:2]
    ),
    "long_skip": lambda *x: ops.long_skip(*x, backend="gemm"),
    "qk_norm": lambda qkv, *x: torch.cat(_QkNormWithTangent.apply(qkv, 2, *x, 1e-5, "auto")).transpose(1, 2),
    "gelu_mlp": lambda x, *w: _GeluMlpWithTangent.apply(x.flatten(0, 1), *w, True, "auto")[0].view(STREAM),
    "repa_cosine": lambda p, q: _CosineWithTangent.apply(p.flatten(0, 1), q.flatten(0, 1), "auto")[0],
    "flow_error": lambda p, x: flow_op.error(p.flatten(1), x.flatten(1), TIMES, POSITIONS, 7, "linear", "auto"),
    "diversity_loss": lambda *x: ops.diversity_loss(x).total,
    "diversity_loss taps": tapped,
}


def inputs(name):
    generator = torch.Generator().manual_seed(len(name))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES[name.split()[0]]]
