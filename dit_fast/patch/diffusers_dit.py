"""diffusers' DiT: BasicTransformerBlock with "ada_norm_zero", and the FeedForward that other models share."""

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from dit_fast.ops import gate_residual, gate_residual_modulate, gelu_mlp, layer_norm_modulate
from dit_fast.patch.replacement import (
    Candidate,
    Forward,
    dropout_reasons,
    linear_reasons,
    modulated_dtype,
    plain_norm_reasons,
    require_plain,
)

LOOKED_FOR = 'diffusers\' BasicTransformerBlock with norm_type "ada_norm_zero" and FeedForward'


def known(module: nn.Module, home: str, name: str) -> bool:
    """Whether module is of diffusers' class `name`; diffusers is not imported for it."""
    kind = getattr(sys.modules.get(home), name, None)
    return kind is not None and isinstance(module, kind)


def find(path: str, module: nn.Module, backend: str) -> Iterator[Candidate]:
    if known(module, "diffusers.models.attention", "BasicTransformerBlock"):
        if getattr(module, "norm_type", None) == "ada_norm_zero":
            yield _block(path, module, backend)
    elif known(module, "diffusers.models.attention", "FeedForward"):
        yield _feed_forward(path, module, backend)


def _block(path: str, module: Any, backend: str) -> Candidate:
    bypassed = {"norm1.norm": module.norm1.norm, "norm3": module.norm3}
    reasons = plain_norm_reasons(norm1_norm=module.norm1.norm, norm3=module.norm3)
    for name in ("attn2", "pos_embed", "fuser"):
        if getattr(module, name, None) is not None:
            reasons.append(f"it has {name}")
    if module.norm1.emb is None:
        reasons.append("norm1 embeds no labels")
    if len(module.norm1._forward_hooks) + len(module.norm1._forward_pre_hooks):
        reasons.append("norm1 has hooks, which would no longer run")

    def arguments(source: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = source.tokens(module.dim)
        return (x,), {
            "timestep": source.integers(1000, 2),
            "class_labels": source.integers(module.num_embeds_ada_norm, 2),
        }

    return Candidate(path, module, "adaln", bypassed, tuple(reasons), _block_forward(backend), arguments)


def _block_forward(backend: str) -> Forward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        if cross_attention_kwargs or self._chunk_size is not None or hidden_states.dim() != 3:
            return type(self).forward(
                self,
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
        norm1 = self.norm1
        embedded = norm1.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
        parts = norm1.linear(norm1.silu(embedded)).chunk(6, dim=1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        dtype = modulated_dtype(hidden_states)
        modulated = layer_norm_modulate(hidden_states, shift_a, scale_a, norm1.norm.eps, backend, out_dtype=dtype)
        attended = self.attn1(
            modulated,
            encoder_hidden_states=encoder_hidden_states if self.only_cross_attention else None,
            attention_mask=attention_mask,
        )
        hidden_states, modulated = gate_residual_modulate(
            hidden_states, attended, gate_a, shift_m, scale_m, self.norm3.eps, backend, out_dtype=dtype
        )
        return gate_residual(hidden_states, self.ff(modulated), gate_m, backend)

    return forward


def _feed_forward(path: str, module: Any, backend: str) -> Candidate:
    into, out = module.net[0], module.net[2]
    bypassed = {f"net.{index}": child for index, child in enumerate(module.net)}
    reasons = linear_reasons(net_0_proj=getattr(into, "proj", None), net_2=out)
    if type(into).__name__ != "GELU" or getattr(into, "approximate", "") != "tanh":
        reasons.append(f"its activation is {type(into).__name__}, not GELU in its tanh form")
    reasons += dropout_reasons(**{f"net_{index}": module.net[index] for index in (1, 3) if index < len(module.net)})
    width = 0 if reasons else into.proj.in_features
    return Candidate(
        path,
        module,
        "gelu_mlp",
        bypassed,
        tuple(reasons),
        _feed_forward_forward(backend),
        lambda source: ((source.tokens(width),), {}),
    )


def _feed_forward_forward(backend: str) -> Forward:
    def forward(self: Any, hidden_states: Tensor, *others: Any, **named: Any) -> Tensor:
        if others or named:
            return type(self).forward(self, hidden_states, *others, **named)
        fc1, fc2 = self.net[0].proj, self.net[2]
        require_plain(fc1)
        require_plain(fc2)
        return gelu_mlp(hidden_states, fc1.weight, fc1.bias, fc2.weight, fc2.bias, backend)

    return forward
