"""What is measured: op -> shapes, inputs, sides. One more op is one more file here and one more line below."""

from dit_fast.benchmarks.cases import adaln, diversity, long_skip
from dit_fast.benchmarks.cases.case import Benchmark, Case

BENCHMARKS: dict[str, Benchmark[Case]] = {
    module.BENCHMARK.op: module.BENCHMARK
    for module in (diversity, long_skip, adaln)
}
