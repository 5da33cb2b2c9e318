"""Triton kernels, one file per op. Importing this package needs no Triton; importing a kernel file does."""

import importlib.util
import os


def devices() -> tuple[str, ...]:
    """Types of device whose tensors the kernels take in this process: CUDA, and under TRITON_INTERPRET=1 the CPU."""
    return ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


def unavailable() -> str | None:
    """Why no Triton kernel can run in this process, or None. Under TRITON_INTERPRET=1 they run on CPU tensors."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if "cpu" in devices():
        return None
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


SHORT_LAUNCHES = ("3.6", "3.9")  # versions of Triton whose C function `launch.py` knows


def ordinary_launches() -> str | None:
    """Why every launch goes through all of Triton's Python here, 40 to 60 us each; None if it does not."""
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    if version in SHORT_LAUNCHES:
        return None
    return f"Triton {version} is not one of {', '.join(SHORT_LAUNCHES)}"
