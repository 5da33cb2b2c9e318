"""diffusers' HunyuanDiT: blocks of the second half begin with a long skip; the rest of the block stays as it is."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from dit_fast.ops import long_skip
from dit_fast.patch.diffusers_dit import known
from dit_fast.patch.parts import is_tokens, linear_reasons
from dit_fast.patch.replacement import Candidate, rest

LOOKED_FOR = "diffusers' HunyuanDiTBlock with skip_norm, skip_linear"


def find(path: str, module: Any, backend: str) -> Iterator[Candidate]:
    home = "diffusers.models.transformers.hunyuan_transformer_2d"
    if not known(module, home, "HunyuanDiTBlock") or module.skip_linear is None:
        return
    reasons = linear_reasons(skip_linear=module.skip_linear)
    norm = module.skip_norm
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        reasons.append("skip_norm is not a LayerNorm with weight and bias")
    width = 0 if reasons else module.skip_linear.out_features

    def arguments(source: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        text = source.normal(source.samples, 3, module.attn2.cross_attention_dim)
        return (source.tokens(width), text, source.vectors(width)), {"skip": source.tokens(width)}

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb: Tensor | None,
        image_rotary_emb: Any,
        skip: Any,
    ) -> Tensor:
        if not is_tokens(hidden_states) or not is_tokens(skip) or skip.shape != hidden_states.shape:
            return NotImplemented
        norm, linear = self.skip_norm, self.skip_linear
        x = long_skip(hidden_states, skip, norm.weight, norm.bias, linear.weight, linear.bias, norm.eps, backend)
        x = x + self.attn1(self.norm1(x, temb), image_rotary_emb=image_rotary_emb)
        x = x + self.attn2(
            self.norm2(x), encoder_hidden_states=encoder_hidden_states, image_rotary_emb=image_rotary_emb
        )
        return x + self.ff(self.norm3(x))

    bypassed = rest(module, "norm1", "attn1", "norm2", "attn2", "norm3", "ff")
    yield Candidate(path, module, "long_skip", bypassed, tuple(reasons), forward, arguments)
