"""Which of several ways is the fastest here: `python -m dit_fast.benchmarks.tune attention | long_skip`.

Writes tune_NAME.json: a table of the best, keyed by architecture, shape and types, beside every candidate's raw times.
Nothing reads it: a row that wins moves by hand into the table of the kernel or module, whose proofs are then run again.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

ATTENTION = [(16, tokens, width) for tokens in (256, 1024) for width in (64, 72)]  # heads, tokens, width of a head
LONG_SKIP = [(rows, width) for width in (1152, 1024, 768) for rows in (8192, 16384, 65536)]
TILES = [(*tile, warps, stages) for tile in ((64, 128), (128, 128), (128, 256), (256, 128)) for warps in (4, 8)
         for stages in (3, 4)]  # fmt: skip
ROUNDS = 10
Way = tuple[str, Callable[[], AbstractContextManager[Any]]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dit_fast.benchmarks.tune", description="Sweep one table.")
    parser.add_argument("name", choices=["attention", "long_skip"])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, required=True, help="folder for tune_NAME.json")
    parser.add_argument("--small", action="store_true", help="one tiny shape, whose times mean nothing")
    parser.add_argument("--commit", help="recorded where there is no git history")
    options = parser.parse_args(argv)

    from dit_fast.benchmarks.results import device_of, environment, occasion, rounded, write

    device = device_of(options.device)
    where = environment(device, options.commit)
    rows: list[dict[str, Any]] = []
    for key, ways, run in (_attention if options.name == "attention" else _long_skip)(device, options.small):
        rows.append(key | _fastest(ways, run, device, exact=options.name != "attention"))
        print(rows[-1] | {"seconds": None})
        write(options.out / f"tune_{options.name}.json",
              rounded({**where, **occasion(), "arch": where["device"]["arch"], "table": rows}))  # fmt: skip
    return 0


def _fastest(ways: Sequence[Way], run: Callable[[], Sequence[Any]], device: Any, exact: bool) -> dict[str, Any]:
    """The first way is today's; one that raises is refused by name, and one of ours that changes a bit."""
    import torch

    from dit_fast.benchmarks.measure import reason
    from dit_fast.benchmarks.timing import clock_for, interleave, summarise

    present: Sequence[Any] = ()
    sides: dict[str, Any] = {}
    refused: dict[str, str] = {}

    def timed(way: Callable[[], AbstractContextManager[Any]]) -> Any:
        def call(number: int, mark: Callable[[], None]) -> Any:
            with way():
                result = run()
            mark()
            return result

        return call

    for name, way in ways:
        try:
            with way():
                result = run()
            present = present or result
            if exact and not all(torch.equal(x, y) for x, y in zip(result, present, strict=True)):
                refused[name] = "other bits"
            else:
                sides[name] = timed(way)
        except Exception as error:
            refused[name] = reason(error)
    times = interleave(sides, clock_for(device), samples=ROUNDS, seconds=60.0)
    seconds = {name: [turn[0] for turn in turns] for name, turns in times.items()}
    best = min(seconds, key=lambda name: summarise(seconds[name]).median)
    return {"best": best, "present": ways[0][0], "seconds": seconds, "refused": refused}


def _attention(device: Any, small: bool) -> Iterator[tuple[dict[str, Any], list[Way], Any]]:
    """SDPA's back ends by tokens and head width, forward and backward, in the type of training."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
                "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip
    for heads, tokens, width in [(2, 8, 16)] if small else ATTENTION:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        shape = (2 if small else 32, heads, tokens, width)
        q, k, v = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3))
        upstream = torch.randn_like(q)

        def run(inputs: Any = (q, k, v), upstream: Any = upstream) -> Sequence[Any]:
            return torch.autograd.grad(scaled_dot_product_attention(*inputs), inputs, upstream)

        ways: list[Way] = [("torch's choice", nullcontext)]
        ways += [(name, partial(sdpa_kernel, backend)) for name, backend in backends.items()]
        yield {"tokens": tokens, "head_width": width, "compute": str(dtype)}, ways, run


def _long_skip(device: Any, small: bool) -> Iterator[tuple[dict[str, Any], list[Way], Any]]:
    """Tiles of both GEMMs at once, streams in bf16 and mixed; block_k orders sums and stays."""
    import torch

    from dit_fast import ops
    from dit_fast.kernels import long_skip_tiles
    from dit_fast.kernels.long_skip_tiles import CONFIGS, Tiles

    def chosen(arch: int, kind: str, *_: Any, tile: tuple[int, ...]) -> Tiles:
        m, n, warps, stages = tile
        return Tiles(m, n, CONFIGS[arch, kind, "many"].block_k, warps, stages)

    for (rows, width), stream in product([(256, 128)] if small else LONG_SKIP, (torch.bfloat16, torch.float32)):
        x = torch.randn(rows, width, device=device, dtype=stream).requires_grad_()
        skip = torch.randn(rows, width, device=device, dtype=torch.bfloat16).requires_grad_()
        shapes = ((2 * width,), (2 * width,), (width, 2 * width), (width,))
        parameters = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]

        def run(inputs: Any = (x, skip, *parameters)) -> Sequence[Any]:
            x, skip, norm_weight, norm_bias, weight, bias = inputs
            with torch.autocast(inputs[0].device.type, torch.bfloat16):
                y = ops.long_skip(x, skip, norm_weight, norm_bias, weight, bias, backend="triton")
            return (y, *torch.autograd.grad(y, inputs, torch.ones_like(y)))

        ways: list[Way] = [("present", nullcontext)]
        ways += [
            (" x ".join(map(str, tile)), partial(mock.patch.object, long_skip_tiles, "tiles_for", how))
            for tile in TILES
            for how in [partial(chosen, tile=tile)]
        ]
        yield {"rows": rows, "width": width, "stream": str(stream), "compute": "bf16"}, ways, run


if __name__ == "__main__":
    sys.exit(main())
