"""Samples per second and MFU: model FLOPs against the matrix product this machine really reaches."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Rate of samples between readings; time spent in `away` (checkpoints, previews) does not count."""

    def __init__(self) -> None:
        self._since, self._away = time.perf_counter(), 0.0

    @contextmanager
    def away(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._away += time.perf_counter() - start

    def rate(self, samples: int) -> float:
        """Samples per second since the last reading."""
        now = time.perf_counter()
        elapsed = now - self._since - self._away
        self._since, self._away = now, 0.0
        return samples / max(elapsed, 1e-9)


def matmul_ceiling(device: torch.device, precision: str) -> float:
    """FLOP/s of the best of a few large square matrix products in the run's dtype, multiply-add = 2.

    On a CPU in fp32 too: without bf16 instructions bare products in bf16 are slower than those inside a model.
    """
    size, repeats = (8192, 10) if device.type == "cuda" else (768, 4)
    dtypes = [torch.bfloat16 if precision == "bf16" else torch.float32]
    if precision == "bf16" and device.type == "cpu":
        dtypes.append(torch.float32)
    best = 0.0
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(repeats + 1):
            _wait(device)
            start = time.perf_counter()
            a @ b
            _wait(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
