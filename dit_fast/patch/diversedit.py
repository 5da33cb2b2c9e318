"""DiverseDiT's long skips: their concatenation stands in the model's forward, so that forward is replaced whole.

The two published wirings have the same parameters. A model's wiring is detected by running it: its own forward on a
small input, against both. Its result is {"x": velocity, "block_feas": {block: its output}, "zs": projected tokens},
where "block_feas" is there if the attribute block_diversity_loss is set; in later versions only in train mode.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_fast.errors import ConfigError
from dit_fast.ops import long_skip
from dit_fast.patch.parts import linear_reasons
from dit_fast.patch.proof import Proofs, obstacle
from dit_fast.patch.replacement import Candidate, Forward, rest

SkipWiring = Literal["input", "output"]
_Collects = Literal["always", "in training"]
LOOKED_FOR = "models with blocks, skip_norms, skip_linears (half as many as blocks)"

_CALLED = ("x_embedder", "t_embedder", "y_embedder", "blocks", "projectors", "final_layer")
_NEEDED = ("x_embedder", "t_embedder", "y_embedder", "final_layer")
_FLAG = "block_diversity_loss"


def find(path: str, module: Any, backend: str, skip_wiring: SkipWiring | None, proofs: Proofs) -> Iterator[Candidate]:
    lists = [getattr(module, name, None) for name in ("blocks", "skip_norms", "skip_linears")]
    if not all(isinstance(entry, nn.ModuleList) for entry in lists):
        return
    blocks, norms, linears = (list(cast(nn.ModuleList, entry)) for entry in lists)
    reasons = [f"it has no {name}" for name in (*_NEEDED, "pos_embed", "unpatchify") if not hasattr(module, name)]
    if not norms or len(blocks) != 2 * len(norms) or len(norms) != len(linears):
        reasons.append(f"{len(blocks)} blocks do not go with {len(norms)} skip_norms and {len(linears)} skip_linears")
    for k, norm in enumerate(norms):
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
            reasons.append(f"skip_norms.{k} is not a LayerNorm with weight and bias")
    reasons += linear_reasons(**{f"skip_linears.{k}": _map(linear) for k, linear in enumerate(linears)})

    def candidate(wiring: SkipWiring, collects: _Collects = "always", extra: tuple[str, ...] = ()) -> Candidate:
        return Candidate(
            path,
            module,
            "long_skip",
            rest(module, *_CALLED),
            (*reasons, *extra),
            _model_forward(backend, wiring, collects),
            lambda source: (_inputs(module, source), {}),
            {id(block): _StandIn(index) for index, block in enumerate(blocks)},
            tuple({_FLAG: value} for value in (True, False)) if hasattr(module, _FLAG) else ({},),
            _shorten,
        )

    if obstacle(candidate("input")) is not None:
        yield candidate("input")
        return
    wirings: tuple[SkipWiring, ...] = (skip_wiring,) if skip_wiring else ("input", "output")
    whens: tuple[_Collects, ...] = ("always", "in training")
    tried = {key: candidate(*key) for key in product(wirings, whens)}
    found = {key: proofs.disagreement(entry) for key, entry in tried.items()}
    agreeing = {key[0]: tried[key] for key, reason in found.items() if reason is None}
    if len(agreeing) == 1:
        yield agreeing.popitem()[1]
    elif agreeing:
        yield candidate("input", extra=("both wirings agree with its forward; say skip_wiring='input' or 'output'",))
    else:
        told = f"'{skip_wiring}' is not the wiring" if skip_wiring else "neither wiring is that"
        why = "; ".join(f"with '{wiring}' {found[wiring, 'always']}" for wiring in wirings)
        yield candidate(wirings[0], extra=(f"{told} of its forward: {why}",))


def check_wiring(skip_wiring: str | None) -> None:
    if skip_wiring not in (None, "input", "output"):
        raise ConfigError(f"skip_wiring must be 'input', 'output' or None (told by a probe), not '{skip_wiring}'")


class _StandIn(nn.Module):
    """Takes a block's place in the copy for the proof: another map for each index, of x and c, per token."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + torch.sin((1 + 0.3 * self.index) * x + c.unsqueeze(1))


def _map(entry: nn.Module) -> nn.Module:
    """The published wrapper holds its map under `linear`."""
    return getattr(entry, "linear", entry)


def _inputs(module: Any, source: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight = next(parameter for parameter in module.x_embedder.parameters() if parameter.dim() == 4)
    side = round(module.pos_embed.shape[1] ** 0.5) * weight.shape[-1]
    labels = next(parameter for parameter in module.y_embedder.parameters() if parameter.dim() == 2).shape[0] - 1
    latents = source.normal(source.samples, weight.shape[1], side, side)
    return latents, source.normal(source.samples).sigmoid(), source.integers(labels)


def _shorten(model: Any, tokens: int) -> None:
    """The first so many tokens only, zeros in place of the others after the head; patches of an image are no choice."""
    full = model.pos_embed.shape[1]
    if tokens >= full:
        return
    kept = model.pos_embed[:, :tokens]
    model.pos_embed = nn.Parameter(kept) if isinstance(model.pos_embed, nn.Parameter) else kept
    model.x_embedder.register_forward_hook(lambda module, inputs, x: x[:, :tokens])
    model.final_layer.register_forward_hook(lambda module, inputs, x: F.pad(x, (0, 0, 0, full - tokens)))


def _model_forward(backend: str, wiring: SkipWiring, collects: _Collects) -> Forward:
    def forward(self: Any, x: Tensor, t: Tensor, y: Tensor) -> Any:
        if not getattr(self, "skip_layer_connection", True):
            return NotImplemented
        x = self.x_embedder(x) + self.pos_embed
        time = self.t_embedder(t)
        c = time + self.y_embedder(y, self.training)
        half = len(self.blocks) // 2
        stored: list[Tensor] = []
        features: dict[int, Tensor] = {}
        projected: list[Tensor] | None = None
        for index, block in enumerate(self.blocks):
            if wiring == "input":
                if index < half:
                    stored.append(x)
                else:
                    x = _fuse(self, index - half, x, stored.pop(), backend)
            x = block(x, c)
            if wiring == "output":
                if index >= half:
                    x = _fuse(self, index - half, x, stored.pop(), backend)
                else:
                    stored.append(x)
            features[index] = x
            if index + 1 == getattr(self, "encoder_depth", None):
                rows, width = x.shape[:2], x.shape[-1]
                projected = [
                    projector(x.reshape(-1, width)).reshape(*rows, -1) for projector in getattr(self, "projectors", ())
                ]
        result: dict[str, Any] = {"x": self.unpatchify(self.final_layer(x, c))}
        if getattr(self, _FLAG, False) and (self.training or collects == "always"):
            result["block_feas"] = features
        return result | {"zs": projected}

    return forward


def _fuse(model: Any, index: int, x: Tensor, skip: Tensor, backend: str) -> Tensor:
    norm, linear = model.skip_norms[index], cast(Any, _map(model.skip_linears[index]))
    return long_skip(x, skip, norm.weight, norm.bias, linear.weight, linear.bias, norm.eps, backend)
