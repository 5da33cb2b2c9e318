"""Measured ceilings of this machine (copy, read, matrix product), taken in the same run as the results."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SUSTAINED_SECONDS = 3.0
# Dense matrix FLOP/s in 16 bits of NVIDIA's data sheets, without sparsity, by a part of the device's name.
DATA_SHEETS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "RTX 4090": 165e12,
}  # fmt: skip


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


def data_sheet(device: torch.device, dtype: str) -> float | None:
    """Matrix FLOP/s that the maker states for this device and dtype; None where we have no sheet."""
    if device.type != "cuda" or dtype == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in DATA_SHEETS.items() if part in name), None)


def sustained_matmul(device: torch.device, dtype: str, *, small: bool = False) -> float:
    """FLOP/s of matrix products in a row for some seconds, over all of that time: the rate that power and heat allow,
    below that of the fastest single product."""
    cuda = device.type == "cuda"
    side = 8192 if cuda and not small else 512
    seconds, batch = (0.05, 2) if small else (SUSTAINED_SECONDS, 20 if cuda else 2)
    a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    out = a @ b
    _wait(device)
    start, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds or not count:
        for _ in range(batch):
            torch.mm(a, b, out=out)
        _wait(device)
        count += batch
    return 2 * side**3 * count / spent


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
