"""The modules of the published DiT, SiT, REPA and DiverseDiT code, known by their submodules' names and shapes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dit_fast.ops import gate_residual, gate_residual_modulate, gelu_mlp, layer_norm_modulate, qk_norm
from dit_fast.patch.parts import (
    dropout_reasons,
    is_tokens,
    linear_reasons,
    modulated_dtype,
    one_dtype,
    plain_norm_reasons,
    widened,
)
from dit_fast.patch.replacement import Candidate, rest

LOOKED_FOR = (
    "blocks with norm1, attn, norm2, mlp, adaLN_modulation; heads with norm_final, linear, adaLN_modulation; "
    "MLPs with fc1, act, fc2; attention with qkv, q_norm, k_norm, proj"
)


def find(path: str, module: nn.Module, backend: str) -> Iterator[Candidate]:
    names = {name for name, _ in module.named_children()}
    if {"norm1", "attn", "norm2", "mlp", "adaLN_modulation"} <= names:
        yield _block(path, module, backend)
    if {"norm_final", "linear", "adaLN_modulation"} <= names:
        yield _final_layer(path, module, backend)
    if {"fc1", "act", "fc2"} <= names:
        yield _mlp(path, module, backend)
    if {"qkv", "q_norm", "k_norm", "proj"} <= names and not isinstance(module.q_norm, nn.Identity):
        yield _attention(path, module, backend)


def adaln_block(
    x: Tensor,
    modulation: Sequence[Tensor],
    attend: Callable[[Tensor], Tensor],
    mlp: Callable[[Tensor], Tensor],
    eps: tuple[float, float],
    backend: str,
) -> Tensor:
    """A block of tokens x [N, T, D]. modulation: shift, scale, gate of attention, then of the MLP, [N, D] each."""
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
    modulated = layer_norm_modulate(x, shift_a, scale_a, eps[0], backend, out_dtype=modulated_dtype(x, shift_a))
    attended = attend(modulated)
    x = widened(x, gate_a, attended)
    x, modulated = gate_residual_modulate(
        x, attended, gate_a, shift_m, scale_m, eps[1], backend, out_dtype=modulated_dtype(x, shift_m)
    )
    mapped = mlp(modulated)
    return gate_residual(widened(x, gate_m, mapped), mapped, gate_m, backend)


def two_maps(x: Tensor, fc1: Any, fc2: Any, backend: str) -> Tensor:
    """fc2(gelu(fc1(x))), or NotImplemented where its dtypes are several."""
    parameters = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    return gelu_mlp(x, *parameters, backend) if one_dtype(x, *parameters) else NotImplemented


def _block(path: str, module: Any, backend: str) -> Candidate:
    def forward(self: Any, x: Tensor, c: Tensor) -> Tensor:
        if not is_tokens(x, c):
            return NotImplemented
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)
        return adaln_block(x, modulation, self.attn, self.mlp, (self.norm1.eps, self.norm2.eps), backend)

    reasons = plain_norm_reasons(norm1=module.norm1, norm2=module.norm2)
    reasons += _modulation_reasons(module.adaLN_modulation, module.norm1, 6)
    width = 0 if reasons else module.norm1.normalized_shape[-1]
    return Candidate(
        path,
        module,
        "adaln",
        rest(module, "attn", "mlp", "adaLN_modulation"),
        tuple(reasons),
        forward,
        lambda source: ((source.tokens(width), source.vectors(module.adaLN_modulation[1].in_features)), {}),
    )


def _final_layer(path: str, module: Any, backend: str) -> Candidate:
    def forward(self: Any, x: Tensor, c: Tensor) -> Tensor:
        if not is_tokens(x, c):
            return NotImplemented
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(
            layer_norm_modulate(x, shift, scale, self.norm_final.eps, backend, out_dtype=modulated_dtype(x, shift))
        )

    reasons = plain_norm_reasons(norm_final=module.norm_final)
    reasons += _modulation_reasons(module.adaLN_modulation, module.norm_final, 2)
    width = 0 if reasons else module.norm_final.normalized_shape[-1]
    return Candidate(
        path,
        module,
        "adaln",
        rest(module, "linear", "adaLN_modulation"),
        tuple(reasons),
        forward,
        lambda source: ((source.tokens(width), source.vectors(module.adaLN_modulation[1].in_features)), {}),
    )


def _modulation_reasons(modulation: nn.Module, norm: nn.Module, parts: int) -> list[str]:
    shape: tuple[int, ...] = getattr(norm, "normalized_shape", ())
    fits = (
        isinstance(modulation, nn.Sequential)
        and len(modulation) == 2
        and len(shape) == 1
        and getattr(modulation[1], "out_features", None) == parts * shape[0]
    )
    return [] if fits else [f"adaLN_modulation is not an activation and a linear map to {parts} x the norm's width"]


def _mlp(path: str, module: Any, backend: str) -> Candidate:
    def forward(self: Any, x: Tensor) -> Tensor:
        return two_maps(x, self.fc1, self.fc2, backend)

    reasons = linear_reasons(fc1=module.fc1, fc2=module.fc2)
    if type(module.act) is not nn.GELU or module.act.approximate != "tanh":
        reasons.append(f"act is {module.act!r}, not GELU in its tanh form")
    children = dict(module.named_children())
    others = {name: child for name, child in children.items() if name not in ("fc1", "act", "fc2", "norm")}
    reasons += dropout_reasons(**others)
    if not isinstance(children.get("norm", nn.Identity()), nn.Identity):
        reasons.append("it has a norm between its maps")
    width = 0 if reasons else module.fc1.in_features
    return Candidate(
        path,
        module,
        "gelu_mlp",
        rest(module),
        tuple(reasons),
        forward,
        lambda source: ((source.tokens(width),), {}),
    )


def _attention(path: str, module: Any, backend: str) -> Candidate:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not is_tokens(x):
            return NotImplemented
        q_norm, k_norm = self.q_norm, self.k_norm
        query, key, value = qk_norm(
            self.qkv(x), self.num_heads, q_norm.weight, q_norm.bias, k_norm.weight, k_norm.bias, q_norm.eps, backend
        )
        if getattr(self, "fused_attn", True):
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            mixed = ((query * self.scale) @ key.transpose(-2, -1)).softmax(dim=-1).to(value.dtype) @ value
        mixed = self.proj(mixed.transpose(1, 2).flatten(2))
        return self.proj_drop(mixed) if hasattr(self, "proj_drop") else mixed

    reasons = []
    for name, norm in {"q_norm": module.q_norm, "k_norm": module.k_norm}.items():
        if type(norm) is not nn.LayerNorm:
            reasons.append(f"{name} is {type(norm).__name__}, not nn.LayerNorm")
        elif norm.weight is None or norm.bias is None:
            reasons.append(f"{name} lacks a weight or a bias")
    if not reasons and module.q_norm.eps != module.k_norm.eps:
        reasons.append("q_norm and k_norm have two eps")
    if not isinstance(getattr(module, "num_heads", None), int):
        reasons.append("it does not say num_heads")
    reasons += dropout_reasons(attn_drop=getattr(module, "attn_drop", None))
    width = getattr(module.qkv, "in_features", 0)
    return Candidate(
        path,
        module,
        "qk_norm",
        rest(module, "qkv", "proj", "proj_drop"),
        tuple(reasons),
        forward,
        lambda source: ((source.tokens(width),), {}),
    )
