"""Row statistics that a layer passes to the next, and the dtype that the next linear map needs."""

import torch
from torch import Tensor

from dit_fast.ops import adaln_op
from dit_fast.ops.autocast import autocast_dtype


def linear_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which a linear map after x runs: autocast's where it is on (it leaves float64 alone), else x's."""
    if x.dtype != torch.float64 and (dtype := autocast_dtype(x)) is not None:
        return dtype
    return x.dtype


def worth_handing_on(x: Tensor) -> bool:
    """Whether the op that writes the stream x returns its row statistics for free; the reference needs another pass."""
    if torch.compiler.is_compiling():  # the op chooses when the graph runs
        return x.is_cuda
    return adaln_op.choose_backend("gate_residual", "auto", x) != "torch"
