"""Benchmarks by op: shapes, inputs, sides. A further op is one file here and one line below."""

from dit_fast.benchmarks.cases import adaln, diversity, flow, gelu_mlp, long_skip, mean_flow, qk_norm, repa_cosine
from dit_fast.benchmarks.cases.case import Benchmark, Case

BENCHMARKS: dict[str, Benchmark[Case]] = {
    module.BENCHMARK.op: module.BENCHMARK
    for module in (diversity, long_skip, adaln, qk_norm, gelu_mlp, repa_cosine, flow, mean_flow)
}
