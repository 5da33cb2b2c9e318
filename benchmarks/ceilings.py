"""Measured ceilings of this machine (copy, read, matrix product), taken in the same run as the results."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of a large copy (read and write counted) and of a large sum; FLOP/s of a matmul by dtype."""

    copy: float
    read: float
    matmul: dict[str, float]

    def time_bound(self, bytes_moved: int, flops: int, dtype: str) -> float:
        """Seconds below which work of this size cannot go: the larger of memory time and arithmetic time."""
        return max(bytes_moved / max(self.copy, self.read), flops / self.matmul[dtype])


def measure_ceilings(device: torch.device, *, small: bool = False) -> Ceilings:
    """A second or two, less where `small` (then the numbers say nothing). Random data: zeros run faster.

    float32 products run without TF32, as torch's default has it.
    """
    cuda = device.type == "cuda"
    size = 16 << 20 if small else 2 << 30 if cuda else 256 << 20
    side = 256 if small else 8192 if cuda else 1024
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / _best(lambda: target.copy_(source), device)
    read = size / _best(source.sum, device)
    matmul = {}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        matmul[name] = 2 * side**3 / _best(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
    return Ceilings(copy, read, matmul)


def _best(work: Callable[[], object], device: torch.device, repeats: int = 12) -> float:
    """Seconds of the fastest of a few repetitions after one that does not count."""
    best = float("inf")
    for turn in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        if turn:
            best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
