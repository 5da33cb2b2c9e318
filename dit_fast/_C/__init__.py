"""Compiled libraries, loaded on first use; without them the plain implementations run.

Operators of the CPU library and of the CUDA one, which adds to it, live in `torch.ops.dit_fast_native`; only
`dit_fast.ops` calls them. The host module, which
knows no torch, reads members of latent shards; only `dit_fast.data` calls it.
"""

import functools
import importlib
import logging
from typing import Any

from dit_fast._C.build import CUDA_LIBRARY, HOST, HOST_SOURCES, LIBRARY, compiler, cuda_compiler, source_hash

logger = logging.getLogger("dit_fast")

LEVELS = ("portable", "avx2", "avx512")


@functools.cache
def unavailable() -> str | None:
    """Why the library cannot be used here, with the remedy; None when it is loaded."""
    if not LIBRARY.exists():
        remedy = "run `make native`" if compiler() else "install g++ and run `make native`, or copy one built elsewhere"
        return f"{LIBRARY.name} is not built: {remedy}"
    import torch

    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load ({error.__cause__ or error}): run `make native`"
    expected = source_hash()
    if expected is not None and expected not in _description():
        return f"{LIBRARY.name} was built from other sources: run `make native`"
    return None


@functools.cache
def cuda_unavailable() -> str | None:
    """Why the CUDA library cannot be used here, with the remedy; None when it is loaded."""
    if (reason := unavailable()) is not None:  # it declares the operators
        return reason
    if not CUDA_LIBRARY.exists():
        remedy = "run `make native`" if cuda_compiler() else "install CUDA's nvcc and run `make native`"
        return f"{CUDA_LIBRARY.name} is not built: {remedy}"
    expected = source_hash()
    if expected is not None and f"source={expected} ".encode() not in CUDA_LIBRARY.read_bytes():
        return f"{CUDA_LIBRARY.name} was built from other sources: run `make native`"
    import torch

    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:
        return f"{CUDA_LIBRARY.name} does not load ({error.__cause__ or error}): run `make native`"
    return None


@functools.cache
def host_unavailable() -> str | None:
    """Why the host module cannot be used here, with the remedy; None when it can."""
    if not HOST.exists():
        remedy = "run `make native`" if compiler() else "install g++ and run `make native`"
        return f"{HOST.name} is not built: {remedy}"
    try:
        module = importlib.import_module("dit_fast._C._host")
    except ImportError as error:
        return f"{HOST.name} does not load ({error}): run `make native`"
    expected = source_hash(HOST_SOURCES)
    if expected is not None and expected not in module.build_info:
        return f"{HOST.name} was built from other sources: run `make native`"
    return None


@functools.cache
def host() -> Any | None:
    """The host module, or None where it cannot be used; the reason is then logged, once."""
    reason = host_unavailable()
    if reason is not None:
        logger.info("shards are read by Python: %s", reason)
        return None
    return importlib.import_module("dit_fast._C._host")


def describe() -> str:
    """Instruction set and compiler, for `dit-fast info`; the reason if the library cannot be used."""
    return unavailable() or f"{LEVELS[_level()]}, {_description()}"


def _description() -> str:
    import torch

    return torch.ops.dit_fast_native.build_info()


def _level() -> int:
    import torch

    return torch.ops.dit_fast_native.isa_level()
