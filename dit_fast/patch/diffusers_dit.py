"""diffusers' DiT: BasicTransformerBlock with "ada_norm_zero", and the FeedForward that other models share."""

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from dit_fast.patch.parts import dropout_reasons, is_tokens, linear_reasons, plain_norm_reasons
from dit_fast.patch.published import adaln_block, two_maps
from dit_fast.patch.replacement import Candidate, rest

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
    bypassed = rest(module, "norm1.emb", "norm1.silu", "norm1.linear", "attn1", "ff")
    reasons = plain_norm_reasons(norm1_norm=module.norm1.norm, norm3=module.norm3)
    for name in ("attn2", "pos_embed", "fuser"):
        if getattr(module, name, None) is not None:
            reasons.append(f"it has {name}")
    if module.norm1.emb is None:
        reasons.append("norm1 embeds no labels")

    def arguments(source: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = source.tokens(module.dim)
        return (x,), {
            "timestep": source.integers(1000),
            "class_labels": source.integers(module.num_embeds_ada_norm),
        }

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        encoder_hidden_states: Tensor | None,
        encoder_attention_mask: Tensor | None,
        timestep: Tensor | None,
        cross_attention_kwargs: dict[str, Any] | None,
        class_labels: Tensor | None,
        added_cond_kwargs: dict[str, Tensor] | None,
    ) -> Tensor:
        each = hidden_states.shape[:1]  # one time and one label per sample, not one for all
        if cross_attention_kwargs or not is_tokens(hidden_states) or not isinstance(class_labels, Tensor):
            return NotImplemented
        if not isinstance(timestep, Tensor) or timestep.shape != each or class_labels.shape != each:
            return NotImplemented
        norm1, others = self.norm1, encoder_hidden_states if self.only_cross_attention else None

        def attend(x: Tensor) -> Tensor:
            return self.attn1(x, encoder_hidden_states=others, attention_mask=attention_mask)

        embedded = norm1.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
        modulation = norm1.linear(norm1.silu(embedded)).chunk(6, dim=1)
        return adaln_block(hidden_states, modulation, attend, self.ff, (norm1.norm, self.norm3), backend)

    return Candidate(path, module, "adaln", bypassed, tuple(reasons), forward, arguments)


def _feed_forward(path: str, module: Any, backend: str) -> Candidate:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return two_maps(hidden_states, self.net[0].proj, self.net[2], backend)

    into, out = module.net[0], module.net[2]
    reasons = linear_reasons(net_0_proj=getattr(into, "proj", None), net_2=out)
    if type(into).__name__ != "GELU" or getattr(into, "approximate", "") != "tanh":
        reasons.append(f"its activation is {type(into).__name__}, not GELU in its tanh form")
    reasons += dropout_reasons(**{f"net_{index}": module.net[index] for index in (1, 3) if index < len(module.net)})
    width = 0 if reasons else into.proj.in_features
    return Candidate(
        path,
        module,
        "gelu_mlp",
        rest(module),
        tuple(reasons),
        forward,
        lambda source: ((source.tokens(width),), {}),
    )
