"""Which of several configurations is the fastest here: `python -m dit_fast.benchmarks.tune KERNEL | check`.

Writes tuned/ARCHITECTURE.json in the form that kernels/tuning.py reads, and tune_KERNEL.json with every candidate's raw
times, both after every shape. `check` compares the bits of each entry with those of no table, at its rows and one more.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ATTENTION = [(16, tokens, width) for tokens in (256, 1024) for width in (64, 72)]  # heads, tokens, width of a head
ROWS = (8192, 16384, 65536)
WIDTHS = (1152, 1024, 768)
ROUNDS = 10
SECONDS = 4.0  # of one shape's rounds


class Sweep(NamedTuple):
    """One entry to be filled in. candidates: the kernel file's own choice first. exact: whether all must give the same
    bits. run: forward, or backward too, of what is launched."""

    kernel: str
    key: dict[str, Any]
    candidates: Sequence[Any]
    run: Callable[[], Any]
    exact: bool = True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dit_fast.benchmarks.tune", description="Sweep one table.")
    parser.add_argument("name", choices=[*SWEEPS, "check"])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, required=True, help="folder for tune_NAME.json and tuned/ARCHITECTURE.json")
    parser.add_argument("--small", action="store_true", help="one tiny shape, whose times mean nothing")
    parser.add_argument("--commit", help="recorded where there is no git history")
    options = parser.parse_args(argv)

    from dit_fast.benchmarks.results import device_of, environment, occasion, rounded, write
    from dit_fast.kernels import tuning

    device = device_of(options.device)
    table = options.out / "tuned" / f"{tuning.architecture(device)}.json"
    tuning.TABLES.clear()  # what is compared with is the kernel files' own choice
    if options.name == "check":
        return _check(table, device, options.small)
    rows: list[dict[str, Any]] = []
    where = environment(device, options.commit)
    for sweep in SWEEPS[options.name](device, options.small, 0):
        rows.append({"kernel": sweep.kernel} | sweep.key | _fastest(sweep, device))
        print({name: value for name, value in rows[-1].items() if name != "seconds"}, flush=True)
        write(options.out / f"tune_{options.name}.json", rounded({**where, **occasion(), "table": rows}))
        entries = json.loads(table.read_text()) if table.exists() else {}
        old = [entry for entry in entries.get(sweep.kernel, []) if not sweep.key.items() <= entry.items()]
        entries[sweep.kernel] = [*old, sweep.key | {"configuration": rows[-1]["configuration"]}]
        write(table, entries)
    return 0


@contextmanager
def _with(entries: Mapping[str, Any], device: Any) -> Iterator[None]:
    """As a table with these entries alone decides; what launches keep for a signature belongs to the table."""
    from dit_fast.kernels import tuning

    kept = _kept() if find_spec("triton") else []
    name = json.dumps(entries)
    before = [dict(one) for one in kept]
    _swap(kept, _LAUNCHES.get(name, [{} for _ in kept]))
    try:
        with mock.patch.dict(tuning.TABLES, {tuning.architecture(device): entries}):
            yield
    finally:
        _LAUNCHES[name] = [dict(one) for one in kept]
        _swap(kept, before)


def _kept() -> list[dict[Any, Any]]:
    from dit_fast.kernels import adaln, long_skip_backward, long_skip_forward
    from dit_fast.kernels.launch import Kept

    modules = (adaln, long_skip_forward, long_skip_backward)
    return [value for module in modules for value in vars(module).values() if isinstance(value, Kept)]


_LAUNCHES: dict[str, list[dict[Any, Any]]] = {}  # by table: making one takes longer than the kernel runs


def _swap(kept: Sequence[dict[Any, Any]], contents: Sequence[Mapping[Any, Any]]) -> None:
    for one, content in zip(kept, contents, strict=True):
        one.clear()
        one.update(content)


def _alone(sweep: Sweep, configuration: Any) -> dict[str, Any]:
    return {sweep.kernel: [sweep.key | {"configuration": configuration}]}


def _fastest(sweep: Sweep, device: Any) -> dict[str, Any]:
    """A candidate that raises, or one of ours that changes a bit, is refused by name."""
    from dit_fast.benchmarks.measure import reason
    from dit_fast.benchmarks.timing import clock_for, interleave, summarise

    sides: dict[str, Any] = {}
    refused: dict[str, str] = {}

    def timed(configuration: Any) -> Any:
        def call(number: int, mark: Callable[[], None]) -> Any:
            with _with(_alone(sweep, configuration), device):
                result = sweep.run()
            mark()
            return result

        return call

    present = sweep.run()
    for candidate in sweep.candidates:
        try:
            with _with(_alone(sweep, candidate), device):
                same = _equal(sweep.run(), present) or not sweep.exact
            if same:
                sides[json.dumps(candidate)] = timed(candidate)
            else:
                refused[json.dumps(candidate)] = "other bits"
        except Exception as error:
            refused[json.dumps(candidate)] = reason(error)
    times = interleave(sides, clock_for(device), samples=ROUNDS, seconds=SECONDS)
    seconds = {name: [turn[0] for turn in turns] for name, turns in times.items()}
    best = min(seconds, key=lambda name: summarise(seconds[name]).median)
    return {"configuration": json.loads(best), "present": sweep.candidates[0], "seconds": seconds, "refused": refused}


def _equal(ours: Any, present: Any) -> bool:
    import torch

    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, present)
    return all(x is y or torch.equal(x, y) for x, y in zip(ours, present, strict=True))


def _check(path: Path, device: Any, small: bool) -> int:
    """1 if an entry of the table changes a bit or is refused, with a line that says which."""
    from dit_fast.benchmarks.measure import reason
    from dit_fast.kernels import tuning

    table, wrong = tuning.read(path.parent).get(path.stem, {}), 0
    for sweep in (sweep for sweeps in SWEEPS.values() for more in (0, 1) for sweep in sweeps(device, small, more)):
        if not sweep.exact or sweep.kernel not in table:
            continue
        present = sweep.run()
        try:
            with _with(table, device):
                found = "equal" if _equal(sweep.run(), present) else "OTHER BITS"
        except Exception as error:
            found = reason(error)
        wrong += found != "equal"
        print(f"{sweep.kernel} {sweep.key}: {found}", flush=True)
    return int(wrong > 0)


def _attention(device: Any, small: bool, more: int) -> Iterator[Sweep]:
    """SDPA's back ends, forward and backward, in the type of training."""
    import torch

    from dit_fast.nn.attention import SDPA, Attention

    for heads, tokens, width in [(2, 8, 16)] if small else ATTENTION:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        batch = 2 if small else 32
        attention = Attention(heads * width, heads)
        qkv = torch.randn(batch, tokens + more, 3, heads, width, device=device, dtype=dtype).requires_grad_()
        upstream = torch.randn(batch, tokens + more, heads, width, device=device, dtype=dtype).transpose(1, 2)

        def run(attention: Any = attention, qkv: Any = qkv, upstream: Any = upstream) -> Sequence[Any]:
            parts = [part.transpose(1, 2) for part in qkv.unbind(2)]
            return torch.autograd.grad(attention.mixed(*parts), qkv, upstream)

        key = {"rows": tokens + more, "width": width, "compute": str(dtype).removeprefix("torch.")}
        yield Sweep("attention", key, list(SDPA), run, exact=False)


def _long_skip(device: Any, small: bool, more: int) -> Iterator[Sweep]:
    """Both GEMMs, the backward's also of a stream in fp32; block_k orders sums and stays."""
    import torch

    from dit_fast.kernels import long_skip, long_skip_tiles

    arch = long_skip_tiles.family(device)
    out = torch.float32 if small else torch.bfloat16  # few sums that differ do so in 16 bits, too
    for width, stream, rows in _shapes(small, more):
        x = torch.randn(rows, width, device=device, dtype=stream)
        skip = torch.randn(rows, width, device=device).bfloat16()
        shapes = ((2 * width,), (2 * width,), (width, 2 * width), (width,))
        gamma, beta, weight, bias = (torch.randn(shape, device=device) for shape in shapes)
        mean, rstd, c1, c2 = (torch.rand(rows, device=device) for _ in range(4))
        folded, row_sums, shift = long_skip.fold(gamma, beta, weight, bias, torch.bfloat16)
        grad = torch.randn(rows, width, device=device).bfloat16()

        forward = partial(long_skip.forward, x, skip, mean, rstd, folded, row_sums, shift, out)
        backward = partial(long_skip.backward_input, grad, x, skip, mean, rstd, folded, c1, c2, want_unit=True)
        wide = stream == torch.float32
        key = {"rows": rows, "width": width, "stream": "fp32" if wide else "bf16", "compute": "bf16"}
        runs: list[tuple[str, str, Callable[[], Any], int]]
        runs = [("backward", "16-bit, float32 out" if wide else "16-bit", backward, 2)]
        if not wide:  # else the library multiplies
            runs.insert(0, ("forward", "16-bit", forward, 1))
        for part, kind, run, halves in runs:
            own = long_skip_tiles.tiles_for(part, kind, x, skip, torch.bfloat16, halves)
            others = [tiles for tiles in long_skip_tiles.configurations(arch, part, kind) if tiles != own]
            yield Sweep(f"long_skip {part}", key, [own, *others], run)


def _adaln(device: Any, small: bool, more: int) -> Iterator[Sweep]:
    """Rows of a program of the forward: gate, residual, norm and modulation together."""
    import torch

    from dit_fast.kernels import adaln

    for width, stream, rows in _shapes(small, more):
        tokens = 8 if small else 256
        x = torch.randn(max(rows // tokens, 1), tokens + more, width, device=device, dtype=stream)
        y = torch.randn_like(x).bfloat16()
        gate, shift, scale = (torch.randn(len(x), width, device=device).bfloat16() for _ in range(3))

        run = partial(adaln.forward, x, y, gate, shift, scale, 1e-6, False, None, torch.bfloat16, True)
        kind = "fp32" if stream == torch.float32 else "bf16"
        key = {"rows": x.shape[0] * x.shape[1], "width": width, "stream": kind, "compute": "bf16"}
        yield Sweep("adaln", key, adaln.PROGRAMS, run)


def _shapes(small: bool, more: int) -> Iterator[tuple[int, Any, int]]:
    """Width, stream type and rows of the streams; those of XL first."""
    import torch

    for width in (64,) if small else WIDTHS:
        for stream in (torch.bfloat16, torch.float32):
            for rows in (72,) if small else ROWS:
                yield width, stream, rows + more


SWEEPS: dict[str, Callable[[Any, bool, int], Iterator[Sweep]]] = {
    "attention": _attention, "long_skip": _long_skip, "adaln": _adaln,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
