"""Ops: each a reference in plain torch (the definition of truth) behind one function that picks the implementation."""

from dit_fast.ops.adaln import gate_residual as gate_residual
from dit_fast.ops.adaln import gate_residual_modulate as gate_residual_modulate
from dit_fast.ops.adaln import layer_norm_modulate as layer_norm_modulate
from dit_fast.ops.attention_cpp import attention as _attention  # noqa: F401  so that torch knows its ops
from dit_fast.ops.diversity import DiversityLoss as DiversityLoss
from dit_fast.ops.diversity import DiversityStats as DiversityStats
from dit_fast.ops.diversity import diversity_loss as diversity_loss
from dit_fast.ops.diversity import diversity_stats as diversity_stats
from dit_fast.ops.diversity_taps import DiversityTaps as DiversityTaps
from dit_fast.ops.diversity_taps import diversity_tap as diversity_tap
from dit_fast.ops.draws import draws as _draws  # noqa: F401  the same
from dit_fast.ops.flow import flow_error as flow_error
from dit_fast.ops.flow import flow_noised as flow_noised
from dit_fast.ops.gelu_mlp import gelu_mlp as gelu_mlp
from dit_fast.ops.long_skip import long_skip as long_skip
from dit_fast.ops.qk_norm import qk_norm as qk_norm
from dit_fast.ops.repa_cosine import repa_cosine as repa_cosine
from dit_fast.ops.row_statistics import RowStatistics as RowStatistics
from dit_fast.ops.row_statistics import row_statistics as row_statistics
