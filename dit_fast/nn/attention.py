"""Multi-head self-attention under timm's parameter names, and who computes it."""

import importlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Literal, NamedTuple, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_fast import backend
from dit_fast.errors import ConfigError
from dit_fast.kernels import tuning
from dit_fast.nn.linear import Reads, linear_flops, xavier_linear
from dit_fast.nn.norm import EPS, NormKind, RMSNorm
from dit_fast.nn.rotary import Rotary
from dit_fast.ops import attention_cpp
from dit_fast.ops import qk_norm as normalise_heads

logger = logging.getLogger("dit_fast")

AttentionKind = Literal["auto", "sdpa", "flash", "math"]
QK_EPS = 1e-5
# Lengths up to which plain products are faster on the CPU than torch's SDPA, forward and backward, by dtype. Heads
# [N, H, T, d] on one core of a Zen 4 with avx512_bf16, ms of plain products / of SDPA: bf16 [32, 5, 64, 32] 5.3 / 31,
# [8, 6, 256, 64] 32 / 59, [2, 6, 1024, 64] 577 / 693; fp32 10.1 / 9.3, 67 / 48, 480 / 214.
PLAIN_ON_CPU = {torch.bfloat16: 1024}
# Back ends of SDPA that a tuned table may name; "torch" leaves it to torch.
SDPA = {
    "torch": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip


class Heads(NamedTuple):
    """Queries and keys [N, H, T, d] of one attention, after their norm and rotation; logits are q k^T / sqrt(d)."""

    query: Tensor
    key: Tensor


@cache
def flash_attention() -> tuple[Callable[..., Tensor] | None, str]:
    """flash-attn's function, or None and the reason why there is none."""
    try:
        return importlib.import_module("flash_attn").flash_attn_func, ""
    except ModuleNotFoundError:
        return None, "the package flash-attn is not installed"
    except (ImportError, OSError, AttributeError) as error:
        reason = f"flash-attn does not load: {str(error).splitlines()[0]}"
        logger.warning("%s; attention runs through torch's SDPA", reason)
        return None, reason


class Attention(nn.Module):
    """Self-attention over tokens [N, T, D] with fused query-key-value projection.

    kind: "sdpa" (torch's `scaled_dot_product_attention`), "flash" (flash-attn or an error), "math" (plain matrix
    products and softmax), "auto": on the CPU `dit_fast.ops.attention_cpp` for queries and keys as they are, or "math"
    where `PLAIN_ON_CPU` says so, else "sdpa" with the back end that a tuned table (kernels/tuning.py) names for these
    tokens, head width and dtype, or of torch's choice; never flash-attn, as no measurement prefers that. In
    forward-mode differentiation, for which the others have no rule, every kind is "math".
    qk_norm: a norm of queries and keys, per head: affine LayerNorm (eps 1e-5), or with norm "rms" an RMSNorm.
    bias: of the query-key-value projection.
    Raises ConfigError for an unknown kind, a width that the heads do not divide, or flash-attn asked for but absent.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        qk_norm: bool = False,
        kind: AttentionKind = "auto",
        norm: NormKind = "layer",
        bias: bool = True,
    ):
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ConfigError(f"num_heads {num_heads} must divide hidden_size {hidden_size}")
        if kind not in get_args(AttentionKind):
            raise ConfigError(f"attention must be one of {', '.join(get_args(AttentionKind))}, not '{kind}'")
        flash, reason = flash_attention() if kind == "flash" else (None, "")
        if kind == "flash" and flash is None:
            raise ConfigError(f'attention "flash" cannot run: {reason}; use attention="auto"')
        self.num_heads = num_heads
        self.kind = kind
        self._flash = flash
        head_width = hidden_size // num_heads
        self.qkv = xavier_linear(hidden_size, 3 * hidden_size, bias)
        if not qk_norm:
            self.q_norm: nn.Module = nn.Identity()
            self.k_norm: nn.Module = nn.Identity()
        elif norm == "rms":
            self.q_norm, self.k_norm = RMSNorm(head_width), RMSNorm(head_width)
        else:
            self.q_norm, self.k_norm = (nn.LayerNorm(head_width, eps=QK_EPS) for _ in range(2))
        self.proj = xavier_linear(hidden_size, hidden_size)

    @overload
    def forward(self, x: Tensor, rotary: Rotary | None = None, heads: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, rotary: Rotary | None = None, *, heads: bool) -> Tensor | tuple[Tensor, Heads]: ...

    def forward(self, x: Tensor, rotary: Rotary | None = None, heads: bool = False) -> Tensor | tuple[Tensor, Heads]:
        """rotary: what turns queries and keys after their norm. heads: whether those are returned too."""
        batch, tokens, width = x.shape
        mixed, own = self.attended(self.qkv(x), rotary, heads)
        rows = mixed if mixed.dim() == 3 else mixed.transpose(1, 2).reshape(batch, tokens, width)
        output = self.proj(rows)
        return output if own is None else (output, own)

    def attended(self, qkv: Tensor, rotary: Rotary | None, heads: bool) -> tuple[Tensor, Heads | None]:
        """What attention makes of the projection [N, T, 3D]: [N, T, D] or [N, H, T, d]; heads: and from what."""
        if self.kind == "auto" and self.is_plain(rotary) and not heads and attention_cpp.takes(qkv, self.num_heads):
            return attention_cpp.attention(qkv, self.num_heads), None
        query, key, value = self._heads(qkv, rotary)
        return self.mixed(query, key, value), Heads(query, key) if heads else None

    def mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Softmax attention of heads [N, H, T, d], like them."""
        if self.kind == "math" or (self.kind == "auto" and _plain_pays(value)) or has_tangent(value):
            return _plain_attention(query, key, value)
        if self._use_flash(value):
            given = (part.transpose(1, 2) for part in (query, key, value))
            return self._flash(*given).transpose(1, 2)  # type: ignore[misc]
        with self._backend(value):
            return F.scaled_dot_product_attention(query, key, value)

    def _heads(self, qkv: Tensor, rotary: Rotary | None) -> tuple[Tensor, ...]:
        """query, key, value [N, H, T, d], the first two normalised and turned where the model does that."""
        q, k = self.q_norm, self.k_norm
        if isinstance(q, nn.LayerNorm) and isinstance(k, nn.LayerNorm):
            parameters = (q.weight, q.bias, k.weight, k.bias)
            return normalise_heads(qkv, self.num_heads, *parameters, QK_EPS, rotary=rotary)
        if isinstance(q, RMSNorm) and isinstance(k, RMSNorm):
            weights = (q.weight, None, k.weight, None)
            return normalise_heads(qkv, self.num_heads, *weights, EPS, norm="rms", rotary=rotary)
        if rotary is not None:
            return normalise_heads(qkv, self.num_heads, None, None, None, None, norm="none", rotary=rotary)
        # Taken apart where they lie, so that the gradient is one buffer, written once, as the projection reads it.
        parts = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return tuple(part.transpose(1, 2) for part in parts)

    def is_plain(self, rotary: Rotary | None) -> bool:
        """Whether queries and keys are parts of the projection as they are."""
        return rotary is None and type(self.q_norm) is type(self.k_norm) is nn.Identity

    def _backend(self, value: Tensor) -> AbstractContextManager[None]:
        """SDPA with the tuned back end, which must take these tensors."""
        if self.kind != "auto" or not tuning.TABLES:
            return nullcontext()
        tokens, width = value.shape[-2:]
        compute = str(value.dtype).removeprefix("torch.")
        name = tuning.tuned("attention", value.device, tokens, SDPA, width=width, compute=compute) or "torch"
        backend = SDPA[name]
        return nullcontext() if backend is None else sdpa_kernel(backend)

    def reads(self) -> Reads:
        return [(self, self.q_norm), (self, self.k_norm)]

    def _use_flash(self, value: Tensor) -> bool:
        if self._flash is None:
            return False
        if not (value.is_cuda and value.dtype in (torch.float16, torch.bfloat16) and value.shape[-1] <= 256):
            raise ConfigError(
                f'attention "flash" needs cuda tensors in fp16 or bf16 with heads up to 256 wide, not {value.dtype} on '
                f'{value.device.type} with {value.shape[-1]}; use attention="auto"'
            )
        return True

    def flops(self, num_tokens: int) -> int:
        """Forward FLOPs of one sample, multiply-add = 2."""
        products = 4 * num_tokens**2 * self.proj.in_features
        return linear_flops(self.qkv, num_tokens) + linear_flops(self.proj, num_tokens) + products


def _plain_pays(value: Tensor) -> bool:
    if value.device.type != "cpu" or backend.forced() == backend.ON_CUDA:
        return False
    return value.shape[2] <= PLAIN_ON_CPU.get(value.dtype, 0)


def has_tangent(x: Tensor) -> bool:
    """Whether x is differentiated in forward mode here."""
    return not torch.compiler.is_compiling() and unpack_dual(x).tangent is not None


def _plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return scores.softmax(dim=-1).to(value.dtype) @ value
