"""The proof before a replacement is installed: recognition is by structure, so it could be wrong.

Both forwards run on copies whose parameters are drawn at random (a freshly made block is the identity whatever stands
in it), in fp32, in eval and in train mode, from one seed. A replacement is refused where a row of a result differs by
more than TOLERANCE of its norm, where one of the two draws random numbers that the other does not (stochastic depth,
dropout, however small its rate), and where one leaves something on the modules that the other does not (a recorded
feature, a counter).
"""

import copy
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit_fast.patch.replacement import Candidate, foreign_forward, uninstall

TOLERANCE = 2e-5  # of a row's norm, fp32
TF32_TOLERANCE = 5e-3  # where the library rounds the factors of fp32 products
_SAMPLES, _TOKENS = 2, 4
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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


def refusal(candidate: Candidate) -> str | None:
    """Why the candidate stays as it is, or None."""
    reasons = [*candidate.reasons]
    if foreign_forward(candidate.module):
        reasons.append("its forward is already replaced on the instance, by something else")
    for name, module in candidate.bypassed.items():
        if any(len(getattr(inner, table)) for inner in module.modules() for table in _HOOKS):
            reasons.append(f"{name} has hooks, which would no longer run")
        if foreign_forward(module):
            reasons.append(f"{name} has a forward of its own on the instance, which would no longer run")
    return "; ".join(reasons) or disagreement(candidate)


def disagreement(candidate: Candidate) -> str | None:
    """Runs both forwards on copies; returns how they differ, or None."""
    device = next(iter(candidate.module.parameters())).device
    if device.type == "meta":
        return "its parameters are on the meta device; give them values first"
    forked = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(forked), torch.no_grad(), torch.autocast(device.type, enabled=False):
            twin = _randomised_copy(candidate, device)
            for setting in candidate.settings:
                for training in (False, True):
                    reason = _disagreement_in_mode(candidate, twin, setting, training, device)
                    if reason is not None:
                        return f"{reason}, in {'train' if training else 'eval'} mode"
    except Exception as error:
        # Whatever a foreign module raises here says that it is not what its structure says.
        return f"it does not run on a small input as recognised: {(str(error) or repr(error)).splitlines()[0]}"
    return None


def _disagreement_in_mode(
    candidate: Candidate, twin: nn.Module, setting: Mapping[str, Any], training: bool, device: torch.device
) -> str | None:
    results, states, changes = [], [], []
    for replaced in (False, True):
        run = copy.deepcopy(twin, {id(parameter): parameter for parameter in twin.parameters()}).train(training)
        vars(run).update(setting)
        positional, named = candidate.arguments(Source(device))
        if replaced:
            vars(run)["forward"] = types.MethodType(candidate.forward, run)
        before = _attributes(run)
        torch.manual_seed(0)
        results.append(run(*positional, **named))
        states.append(torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state())
        after = _attributes(run)
        changes.append({name for name in {**before, **after} if not _same(before.get(name), after.get(name))})
    if changes[0] != changes[1]:
        return f"only one of its own forward and the replacement changes {min(changes[0] ^ changes[1])}"
    if not torch.equal(*states):
        return "its own forward and the replacement draw different random numbers"
    reduced = torch.backends.cuda.matmul.allow_tf32 and device.type == "cuda"
    tolerance = TF32_TOLERANCE if reduced else TOLERANCE
    difference = _difference(*results)
    if difference <= tolerance:
        return None
    return f"its own forward and the replacement differ on a small input ({difference:.1e}, allowed {tolerance:.0e})"


def _attributes(module: nn.Module) -> dict[str, tuple[Any, int]]:
    """Every attribute and buffer of every submodule, with a number that in-place changes alter."""
    found = {}
    for path, inner in module.named_modules():
        for name, value in {**vars(inner), **dict(inner.named_buffers(recurse=False))}.items():
            if isinstance(value, Tensor):
                mark = value._version
            else:
                mark = len(value) if isinstance(value, (list, dict, set)) else 0
            found[f"{path}.{name}" if path else name] = (value, mark)
    return found


def _same(before: tuple[Any, int] | None, after: tuple[Any, int] | None) -> bool:
    return before is not None and after is not None and before[0] is after[0] and before[1] == after[1]


def _randomised_copy(candidate: Candidate, device: torch.device) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    twin = copy.deepcopy(candidate.module, dict(candidate.stand_ins))
    for module in twin.modules():
        for table in _HOOKS:
            getattr(module, table).clear()
        uninstall(module)
    twin = twin.float()
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            # variance 1 per output for maps, 1/4 for vectors, which for norm weights is around 0 as well as any
            spread = (3 * parameter.shape[0] / parameter.numel()) ** 0.5 if parameter.dim() > 1 else 0.75**0.5
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * (2 * spread) - spread)
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
