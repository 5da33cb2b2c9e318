"""Addresses of many tensors in one device table, so that a kernel reads K separate tensors without a copy.

The table is written by a kernel from its own arguments. A host-to-device copy would do it too, but its source must
outlive a captured graph, while arguments are part of the launch. Tensors of a training step tend to come back at the
same addresses, so the last tables are kept, and an equal one is not written again.
"""

from collections import OrderedDict
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels.aot import AotCase

KEPT = 16  # tables
_kept: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor]] = OrderedDict()


@triton.jit
def write_table(addresses, strides, tensors, numbers, COUNT: tl.constexpr):
    """addresses, strides int64 [COUNT] from a tuple of tensors and a tuple of integers."""
    for i in tl.static_range(COUNT):
        tl.store(addresses + i, tensors[i].to(tl.int64))
        tl.store(strides + i, numbers[i])


def address_table(tensors: list[Tensor], numbers: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Addresses and row strides in bytes of tensors [M, ...], or these numbers, int64 on their device, without waiting
    for it.

    Do not write into them: equal tensors get one table. A graph that is being captured gets its own, which lives as
    long as the graph; a table is only shared within the stream that wrote it.
    """
    device = tensors[0].device
    if numbers is None:
        numbers = tuple(tensor.stride(0) * tensor.element_size() for tensor in tensors)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if type(tensors[0]) is not Tensor or (stream and torch.cuda.is_current_stream_capturing()):
        return _written(tensors, numbers)  # of tensors without values, too
    key = (device, stream, *(tensor.data_ptr() for tensor in tensors), *numbers)
    table = _kept.get(key)
    if table is None:
        table = _kept[key] = _written(tensors, numbers)
        if len(_kept) > KEPT:
            _kept.popitem(last=False)
    else:
        _kept.move_to_end(key)
    return table


def _written(tensors: list[Tensor], numbers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    count = len(tensors)
    addresses = torch.empty(count, dtype=torch.int64, device=tensors[0].device)
    strides = torch.empty_like(addresses)
    options = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}
    write_table[(1,)](addresses, strides, tuple(tensors), numbers, COUNT=count, **options)
    return addresses, strides


def is_aligned(tensors: list[Tensor], multiple: int = 16) -> bool:
    """Whether every row of every tensor [M, D] starts at a multiple of this many bytes."""
    return all(
        tensor.data_ptr() % multiple == 0 and tensor.stride(0) * tensor.element_size() % multiple == 0
        for tensor in tensors
    )


def aot_cases(arch: int) -> list[AotCase]:
    """Of the blocks of SiT-B, L and XL, and of the partial sums of adaLN in SiT-XL."""
    return [
        AotCase(
            write_table,
            f"tensors={count}" + " fp32" * (kind == "fp32"),
            {"addresses": "*i64", "strides": "*i64", "tensors": (f"*{kind}",) * count, "numbers": ("i32",) * count},
            {"COUNT": count},
            {"num_warps": 1, "num_stages": 1},
            wide_loads=False,
        )
        for count, kind in ((28, "bf16"), (84, "bf16"), (168, "fp32"))
    ]
