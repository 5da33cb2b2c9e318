"""One module's replaced forward: what it bypasses, how it is proven before it is installed, how it goes in and out.

Recognition is by structure, so it could be wrong. Every replacement is therefore run against the module's own forward
on a copy whose parameters are drawn at random (a freshly made block is the identity whatever stands in it), in eval
mode and fp32, and is refused where a row differs by more than TOLERANCE.
"""

import copy
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dit_fast.errors import UserError

Forward = Callable[..., Any]

TOLERANCE = 2e-5  # of a row's norm, fp32
TF32_TOLERANCE = 5e-3  # where the library rounds the factors of fp32 products
_SAMPLES, _TOKENS = 2, 4


@dataclass(frozen=True)
class Mark:
    """What an installed forward carries, so that a second `apply` knows it."""

    op: str
    backend: str


@dataclass(frozen=True)
class Candidate:
    """A module that an op could run.

    bypassed: its submodules that will not be called any more. reasons: why it cannot be taken, from its structure.
    forward: the new unbound forward. arguments: keyword or positional arguments for the proof, given a random source.
    stand_ins: submodules that the copy for the proof replaces, because they are large and called as they are.
    """

    path: str
    module: nn.Module
    op: str
    bypassed: Mapping[str, nn.Module]
    reasons: tuple[str, ...]
    forward: Forward
    arguments: Callable[["Source"], tuple[tuple[Any, ...], dict[str, Any]]]
    stand_ins: Mapping[int, nn.Module] = field(default_factory=dict)


class Source:
    """Random tensors on the module's device that leave torch's global random state alone."""

    def __init__(self, device: torch.device):
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def tokens(self, width: int) -> Tensor:
        """[2, 4, width]: every token a tenth of the one before, so that a wrong eps shows."""
        decay = 10.0 ** -torch.arange(_TOKENS).view(-1, 1)
        return (torch.randn(_SAMPLES, _TOKENS, width, generator=self.generator) * decay).to(self.device)


def installed(module: nn.Module) -> Mark | None:
    own = vars(module).get("forward")
    return getattr(own, "dit_fast_mark", None)


def install(candidate: Candidate, backend: str) -> None:
    candidate.forward.dit_fast_mark = Mark(candidate.op, backend)  # type: ignore[attr-defined]
    # A bound method: copy.deepcopy binds the copy's to the copy.
    vars(candidate.module)["forward"] = types.MethodType(candidate.forward, candidate.module)


def uninstall(module: nn.Module) -> None:
    if installed(module) is not None:
        del vars(module)["forward"]


def refusal(candidate: Candidate) -> str | None:
    """Why the candidate stays as it is, or None."""
    reasons = [*candidate.reasons]
    if "forward" in vars(candidate.module):
        reasons.append("its forward is already replaced on the instance, by something else")
    for name, module in candidate.bypassed.items():
        if _has_hooks(module):
            reasons.append(f"{name} has hooks, which would no longer run")
        if "forward" in vars(module) and installed(module) is None:
            reasons.append(f"{name} has a forward of its own on the instance, which would no longer run")
    return "; ".join(reasons) or disagreement(candidate)


def _has_hooks(module: nn.Module) -> bool:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(len(getattr(inner, table)) for inner in module.modules() for table in tables)


def disagreement(candidate: Candidate) -> str | None:
    """Runs both forwards on a copy; returns how they differ, or None."""
    device = next(iter(candidate.module.parameters())).device
    if device.type == "meta":
        return "its parameters are on the meta device; give them values first"
    source = Source(device)
    forked = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(forked), torch.no_grad(), torch.autocast(device.type, enabled=False):
            twin = _randomised_copy(candidate, source)
            positional, named = candidate.arguments(source)
            theirs = twin(*positional, **named)
            vars(twin)["forward"] = types.MethodType(candidate.forward, twin)
            ours = twin(*positional, **named)
    except Exception as error:
        # Whatever a foreign module raises here says that it is not what its structure says.
        return f"it does not run on a small input as recognised: {(str(error) or repr(error)).splitlines()[0]}"
    reduced = torch.backends.cuda.matmul.allow_tf32 and device.type == "cuda"
    tolerance = TF32_TOLERANCE if reduced else TOLERANCE
    difference = _difference(theirs, ours)
    if difference <= tolerance:
        return None
    return f"its own forward and the replacement differ on a small input ({difference:.1e}, allowed {tolerance:.0e})"


def _randomised_copy(candidate: Candidate, source: Source) -> nn.Module:
    twin = copy.deepcopy(candidate.module, dict(candidate.stand_ins))
    for module in twin.modules():
        for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, table).clear()
        if installed(module) is not None:
            uninstall(module)
    twin = twin.float().eval()
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            # variance 1 per output for maps, 1/4 for vectors, which for norm weights is around 0 as well as any
            spread = (3 * parameter.shape[0] / parameter.numel()) ** 0.5 if parameter.dim() > 1 else 0.75**0.5
            noise = torch.rand(parameter.shape, generator=source.generator) * (2 * spread) - spread
            parameter.copy_(noise)
    return twin


def _difference(theirs: Any, ours: Any) -> float:
    """Largest difference of a row, relative to its norm; infinite for another structure, shape or dtype."""
    if isinstance(theirs, Tensor) and isinstance(ours, Tensor):
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            return float("inf")
        if not theirs.numel():
            return 0.0
        size = theirs.double().norm(dim=-1)
        error = (theirs.double() - ours.double()).norm(dim=-1)
        worst = float((error / size.clamp_min(0.01 * size.mean()).clamp_min(1e-30)).max())
        return worst if worst == worst else float("inf")
    if type(theirs) is not type(ours):
        return float("inf")
    if isinstance(theirs, Mapping):
        if list(theirs) != list(ours):
            return float("inf")
        theirs, ours = list(theirs.values()), list(ours.values())
    if isinstance(theirs, (list, tuple)):
        if len(theirs) != len(ours):
            return float("inf")
        return max((_difference(left, right) for left, right in zip(theirs, ours, strict=True)), default=0.0)
    return 0.0 if theirs == ours else float("inf")


def linear_reasons(**linears: nn.Module | None) -> list[str]:
    """Why these maps cannot lend their weights to an op: adapters, quantised or bias-free ones."""
    reasons = []
    for name, linear in linears.items():
        if type(linear) is not nn.Linear:
            reasons.append(f"{name} is {type(linear).__module__}.{type(linear).__name__}, not exactly nn.Linear")
        elif linear.bias is None:
            reasons.append(f"{name} has no bias")
    return reasons


def require_plain(linear: nn.Module) -> None:
    """Adapters put in after `apply` would be left out without a word."""
    if type(linear) is not nn.Linear:
        raise UserError(
            f"a linear layer became {type(linear).__name__} after patch.apply; undo the patch, then apply it again"
        )


def dropout_reasons(**dropouts: nn.Module | None) -> list[str]:
    reasons = []
    for name, dropout in dropouts.items():
        if isinstance(dropout, nn.Dropout):
            if dropout.p > 0:
                reasons.append(f"{name} has p = {dropout.p}, which the op does not apply")
        elif dropout is not None and not isinstance(dropout, nn.Identity):
            reasons.append(f"{name} is {type(dropout).__name__}, not nn.Dropout")
    return reasons


def plain_norm_reasons(**norms: nn.Module) -> list[str]:
    """For norms whose modulation comes from the conditioning: LayerNorm without affine parameters."""
    reasons = []
    for name, norm in norms.items():
        if type(norm) is not nn.LayerNorm:
            reasons.append(f"{name} is {type(norm).__name__}, not nn.LayerNorm")
        elif norm.weight is not None or norm.bias is not None:
            reasons.append(f"{name} has affine parameters")
    return reasons


def modulated_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the linear map after a modulated norm runs."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype
