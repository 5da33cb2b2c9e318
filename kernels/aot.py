"""Declarations by which a kernel file is compiled and checked on a machine without a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AotCase:
    """One kernel with one shipped configuration. Every kernel file offers `aot_cases(arch) -> list[AotCase]`.

    kernel: the jitted function. configuration: its name in the lock. signature: Triton type per runtime argument, in
    the order of the kernel's parameters, nested tuples for tuple arguments. constants: the constexpr arguments.
    options: launch options (num_warps, num_stages). unaligned: names of integer arguments that are not divisible by
    16; pointers and all other integers are declared divisible. wide_loads, wide_stores: the kernel must read, write
    global memory in 128-bit pieces. dots: it must use tensor cores; bulk_loads: from sm_90 on those of warp groups, fed
    by bulk copies. ticket: integer atomics are allowed (they find the last program; sums stay in a fixed order).
    """

    kernel: Any
    configuration: str
    signature: Mapping[str, Any]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    unaligned: tuple[str, ...] = ()
    wide_loads: bool = True
    wide_stores: bool = False
    dots: bool = False
    bulk_loads: bool = False
    ticket: bool = False
