"""The modules of the published DiT, SiT, REPA, DiverseDiT and LightningDiT code, known by what they hold."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dit_fast.nn.norm import folded
from dit_fast.ops import gate_residual, gate_residual_modulate, gelu_mlp, layer_norm_modulate, qk_norm
from dit_fast.patch.parts import (
    dropout_reasons,
    is_dense,
    is_tokens,
    linear_reasons,
    modulated_dtype,
    norm_kind,
    one_dtype,
    other_norm,
    plain_norm_reasons,
    widened,
)
from dit_fast.patch.proof import Proofs
from dit_fast.patch.replacement import Candidate, Forward, rest
from dit_fast.patch.rotary import Rotations, stand_in

LOOKED_FOR = (
    "blocks with norm1, attn, norm2, mlp, adaLN_modulation; heads with norm_final, linear, adaLN_modulation; "
    "MLPs with fc1, act, fc2; attention with qkv, q_norm, k_norm, proj"
)


def find(path: str, module: nn.Module, backend: str, proofs: Proofs, rotations: Rotations) -> Iterator[Candidate]:
    names = {name for name, _ in module.named_children()}
    if {"norm1", "attn", "norm2", "mlp", "adaLN_modulation"} <= names:
        yield _block(path, module, backend)
    if {"norm_final", "linear", "adaLN_modulation"} <= names:
        yield _final_layer(path, module, backend)
    if {"fc1", "act", "fc2"} <= names:
        yield _mlp(path, module, backend)
    if {"qkv", "q_norm", "k_norm", "proj"} <= names:
        with_rope = _attention(path, module, backend, rotations) if _takes(module, "rope") else None
        if with_rope is not None and proofs.refusal(with_rope) is None:
            yield with_rope
        elif not isinstance(module.q_norm, nn.Identity):
            yield _attention(path, module, backend)


def adaln_block(
    x: Tensor,
    modulation: Sequence[Any],
    attend: Callable[[Tensor], Tensor],
    mlp: Callable[[Tensor], Tensor],
    norms: tuple[Any, Any],
    backend: str,
) -> Tensor:
    """A block of tokens x [N, T, D]. modulation: shift, scale, gate of attention, then of the MLP, [N, D] each.

    The shifts may be None. norms: before the two, LayerNorms without parameters or RMSNorms.
    """
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
    kind = norm_kind(norms[0])
    modulated = layer_norm_modulate(
        x, shift_a, _folded(norms[0], scale_a), norms[0].eps, backend, out_dtype=modulated_dtype(x, scale_a), norm=kind
    )
    attended = attend(modulated)
    x = widened(x, gate_a, attended)
    x, modulated = gate_residual_modulate(
        x, attended, gate_a, shift_m, _folded(norms[1], scale_m), norms[1].eps, backend,
        out_dtype=modulated_dtype(x, scale_m), norm=kind,
    )  # fmt: skip
    mapped = mlp(modulated)
    return gate_residual(widened(x, gate_m, mapped), mapped, gate_m, backend)


def _folded(norm: Any, scale: Tensor) -> Tensor:
    return folded(norm if norm.weight is not None else None, scale)


def _takes(module: nn.Module, name: str) -> bool:
    """Whether the class's own forward has a further parameter of this name."""
    return name in inspect.signature(type(module).forward).parameters


def two_maps(x: Tensor, fc1: Any, fc2: Any, backend: str) -> Tensor:
    """fc2(gelu(fc1(x))), or NotImplemented where x is no dense tensor or its dtypes are several."""
    parameters = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    return gelu_mlp(x, *parameters, backend) if is_dense(x) and one_dtype(x, *parameters) else NotImplemented


def _block(path: str, module: Any, backend: str) -> Candidate:
    parts = 4 if _outputs(module.adaLN_modulation) == 4 * _width(module.norm1) else 6

    def run(self: Any, x: Tensor, c: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        if not is_tokens(x, c):
            return NotImplemented
        modulation: Sequence[Any] = self.adaLN_modulation(c).chunk(parts, dim=1)
        if parts == 4:
            modulation = (None, *modulation[:2], None, *modulation[2:])
        return adaln_block(x, modulation, attend, self.mlp, (self.norm1, self.norm2), backend)

    def forward(self: Any, x: Tensor, c: Tensor) -> Tensor:
        return run(self, x, c, self.attn)

    def forward_with_rope(self: Any, x: Tensor, c: Tensor, feat_rope: Any) -> Tensor:
        return run(self, x, c, lambda tokens: self.attn(tokens, rope=feat_rope))

    with_rope = _takes(module, "feat_rope") and _takes(module.attn, "rope")

    def arguments(source: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = source.tokens(width), source.vectors(module.adaLN_modulation[1].in_features)
        return ((*given, stand_in(source, width // module.attn.num_heads)) if with_rope else given), {}

    reasons = plain_norm_reasons(norm1=module.norm1, norm2=module.norm2)
    reasons += _modulation_reasons(module.adaLN_modulation, module.norm1, parts)
    width = 0 if reasons else _width(module.norm1)
    bypassed = rest(module, "attn", "mlp", "adaLN_modulation")
    chosen: Forward = forward_with_rope if with_rope else forward
    return Candidate(path, module, "adaln", bypassed, tuple(reasons), chosen, arguments)


def _final_layer(path: str, module: Any, backend: str) -> Candidate:
    def forward(self: Any, x: Tensor, c: Tensor) -> Tensor:
        if not is_tokens(x, c):
            return NotImplemented
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        norm, dtype = self.norm_final, modulated_dtype(x, shift)
        scale, kind = _folded(norm, scale), norm_kind(norm)
        return self.linear(layer_norm_modulate(x, shift, scale, norm.eps, backend, out_dtype=dtype, norm=kind))

    reasons = plain_norm_reasons(norm_final=module.norm_final)
    reasons += _modulation_reasons(module.adaLN_modulation, module.norm_final, 2)
    width = 0 if reasons else _width(module.norm_final)
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
    fits = (
        isinstance(modulation, nn.Sequential)
        and len(modulation) == 2
        and _width(norm) > 0
        and _outputs(modulation) == parts * _width(norm)
    )
    return [] if fits else [f"adaLN_modulation is not an activation and a linear map to {parts} x the norm's width"]


def _width(norm: Any) -> int:
    """Of the rows that a norm takes; 0 where that is not one dimension."""
    shape: tuple[int, ...] = norm.weight.shape if norm_kind(norm) == "rms" else getattr(norm, "normalized_shape", ())
    return shape[0] if len(shape) == 1 else 0


def _outputs(modulation: nn.Module) -> int:
    last = modulation[-1] if isinstance(modulation, nn.Sequential) and len(modulation) else None
    return getattr(last, "out_features", 0)


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


def _attention(path: str, module: Any, backend: str, rotations: Rotations | None = None) -> Candidate:
    """With rotations, one that is called with a module that turns queries and keys."""
    kinds = {"none" if isinstance(norm, nn.Identity) else norm_kind(norm) for norm in (module.q_norm, module.k_norm)}
    kind = next(iter(kinds)) or "none"

    def forward_with_rope(self: Any, x: Tensor, rope: Any) -> Tensor:
        if not is_tokens(x):
            return NotImplemented
        qkv, (q_norm, k_norm) = self.qkv(x), (self.q_norm, self.k_norm)
        (q_weight, q_bias), (k_weight, k_bias) = (
            (getattr(norm, "weight", None), getattr(norm, "bias", None)) for norm in (q_norm, k_norm)
        )
        tables = rotations.tables(rope, qkv) if rotations and rope is not None else None
        eps = getattr(q_norm, "eps", 0.0)
        query, key, value = qk_norm(qkv, self.num_heads, q_weight, q_bias, k_weight, k_bias, eps, backend, kind, tables)
        if rope is not None and tables is None:
            query, key = rope(query), rope(key)
        if getattr(self, "fused_attn", True):
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            mixed = ((query * self.scale) @ key.transpose(-2, -1)).softmax(dim=-1).to(value.dtype) @ value
        mixed = self.proj(mixed.transpose(1, 2).flatten(2))
        return self.proj_drop(mixed) if hasattr(self, "proj_drop") else mixed

    def forward(self: Any, x: Tensor) -> Tensor:
        return forward_with_rope(self, x, None)

    def arguments(source: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = source.tokens(width)
        return ((x, stand_in(source, width // module.num_heads)) if rotations else (x,)), {}

    reasons = []
    for name, norm in {"q_norm": module.q_norm, "k_norm": module.k_norm}.items():
        if not isinstance(norm, nn.Identity) and not norm_kind(norm):
            reasons.append(f"{name} is {other_norm(norm)}")
        elif type(norm) is nn.LayerNorm and norm.weight is None:
            reasons.append(f"{name} lacks a weight or a bias")
    if not reasons and (len(kinds) > 1 or getattr(module.q_norm, "eps", 0) != getattr(module.k_norm, "eps", 0)):
        reasons.append("q_norm and k_norm are two kinds of norm, or have two eps")
    if not isinstance(getattr(module, "num_heads", None), int):
        reasons.append("it does not say num_heads")
    reasons += dropout_reasons(attn_drop=getattr(module, "attn_drop", None))
    width = getattr(module.qkv, "in_features", 0)
    bypassed = rest(module, "qkv", "proj", "proj_drop")
    chosen: Forward = forward_with_rope if rotations else forward
    return Candidate(path, module, "qk_norm", bypassed, tuple(reasons), chosen, arguments)
