"""The proof before a replacement is installed: recognition is by structure, so it could be wrong.

Both forwards run on copies whose parameters are drawn at random (a freshly made block is the identity whatever stands
in it), from one seed, in eval and in train mode, on the inputs of TRIALS: short and long, one sample and several, rows
from a thousandth to a thousand, fp32 and half precision. A replacement is refused where a row of a result differs by
more than the trial allows, where a gradient differs, where one of the two draws random numbers that the other does not
(stochastic depth, dropout, however small its rate), where one leaves something on the modules that the other does not
(a recorded feature, a counter), where the module's own checkpoints activations, and where it turns autocast off for a
map. Modules that differ in nothing but the values of their parameters share one proof.
"""

import contextlib
import copy
import sys
import time
import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dit_fast.ops.autocast import autocast_dtype_of
from dit_fast.patch.parts import HOOKS, odd_parameter, plain_attributes
from dit_fast.patch.replacement import Candidate, dispatch, foreign_forward, uninstall

TOLERANCE = 2e-5  # of a row's norm, fp32
TF32_TOLERANCE = 5e-3  # where the library rounds the factors of fp32 products
GRADIENT_TOLERANCE = 1e-3  # of the norm of each gradient, fp32
_CPU: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
_SILENT_SECONDS = 0.5  # after which apply says what it is doing


class Trial(NamedTuple):
    """Inputs [samples, tokens, ...], the first token's entries of size 10**first, the last one's of 10**last."""

    samples: int
    tokens: int
    first: float
    last: float
    dtype: torch.dtype = torch.float32
    tolerance: float = TOLERANCE
    modes: tuple[bool, ...] = (False, True)
    gradients: bool = False
    autocast: bool = False


TRIALS = (
    Trial(2, 4, 0, -3, gradients=True),  # every token a tenth of the one before, so that a wrong eps shows
    Trial(1, 256, -3, 3, modes=(True,)),
    Trial(3, 1, 0, 0, modes=(False,)),
    Trial(2, 4, 0, 0, torch.bfloat16, 5e-2, modes=(False,)),
    Trial(2, 4, 0, 0, torch.float16, 1e-2, modes=(False,)),
    Trial(2, 4, 0, 0, tolerance=5e-2, modes=(False,), autocast=True),
)


class RandomInputs:
    """Random tensors on the module's device that leave torch's global random state alone."""

    def __init__(self, device: torch.device, trial: Trial):
        self.device, self.trial = device, trial
        self.samples = trial.samples
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, **_CPU).to(self.device, self.trial.dtype)

    def vectors(self, width: int) -> Tensor:
        return self.normal(self.samples, width)

    def integers(self, high: int) -> Tensor:
        return torch.randint(high, (self.samples,), generator=self.generator, device="cpu").to(self.device)

    def tokens(self, width: int) -> Tensor:
        """[samples, tokens, width]."""
        sizes = 10.0 ** torch.linspace(self.trial.first, self.trial.last, self.trial.tokens, **_CPU).view(-1, 1)
        tokens = torch.randn(self.samples, self.trial.tokens, width, generator=self.generator, **_CPU) * sizes
        return tokens.to(self.device, self.trial.dtype)


class Proofs:
    """The proofs of one `apply`: each kind of module once."""

    def __init__(self) -> None:
        self._verdicts: dict[Any, tuple[str | None, Candidate]] = {}
        self._started = time.monotonic()

    def refusal(self, candidate: Candidate) -> str | None:
        """Why the candidate stays as it is, or None."""
        return obstacle(candidate) or self.disagreement(candidate)

    def disagreement(self, candidate: Candidate) -> str | None:
        """How the two forwards of the candidate, or of its like, differ; None if they do not."""
        key = _likeness(candidate)
        if key not in self._verdicts:
            if time.monotonic() - self._started > _SILENT_SECONDS:
                name = f"{candidate.path or 'the model'} ({candidate.op})"
                print(f"patch.apply: comparing {name} and its like with their own forwards", file=sys.stderr)
            self._verdicts[key] = disagreement(candidate), candidate
        return self._verdicts[key][0]


def obstacle(candidate: Candidate) -> str | None:
    """What stands on this very module that forbids a replacement, found without running it."""
    reasons = [*candidate.reasons]
    theirs = foreign_forward(candidate.module)
    if theirs is not None:
        reasons.append(f"its forward is already replaced on the instance, by {theirs}")
    for name, module in candidate.bypassed.items():
        if any(len(getattr(module, table)) for table in HOOKS):
            reasons.append(f"{name} has hooks, which would no longer run")
        if foreign_forward(module) is not None:
            reasons.append(f"{name} has a forward of its own on the instance, which would no longer run")
    odd = odd_parameter(candidate.module)
    if odd is not None:
        reasons.append(f"{odd}; apply the patch before sharding or quantising")
    return "; ".join(reasons) or None


def _likeness(candidate: Candidate) -> Any:
    """Equal for modules that the same proof is good for: all but the values of parameters enters it."""
    if candidate.stand_ins:
        return id(candidate)
    numbers: dict[int, int] = {}
    rows: list[Any] = [candidate.op, candidate.forward.__code__]
    for path, module in candidate.module.named_modules():
        plain = dict(plain_attributes(module))
        rows += [path, type(module), *sorted(plain.items())]
        alike = {*plain, *_MANAGED, *(() if foreign_forward(module) else ("forward",))}  # ours is taken off the copy
        rows += [(name, id(value)) for name, value in vars(module).items() if name not in alike]
        rows += [(name, id(value)) for name, value in module._buffers.items()]
        for name, value in module._parameters.items():
            rows.append(name)
            if value is not None:
                rows += [value.shape, value.dtype, value.device, numbers.setdefault(id(value), len(numbers))]
    return tuple(rows)


# What nn.Module keeps on every instance: compared above where it matters, or taken off the copies.
_MANAGED = frozenset(vars(nn.Module()))


def disagreement(candidate: Candidate) -> str | None:
    """Runs both forwards on copies; returns how they differ, or None."""
    tensors = (*candidate.module.parameters(), *candidate.module.buffers())
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type == "meta":
        return "its parameters are on the meta device; give them values first"
    forked = [device] if device.type == "cuda" else []
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(forked))
            stack.enter_context(torch.autocast(device.type, enabled=False))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(device)  # whatever torch.device(...) stands around apply
            twin = _randomised_copy(candidate)
            for trial in TRIALS:
                # The settings are about what the forward does, not about numbers.
                for setting in candidate.settings if trial is TRIALS[0] else candidate.settings[:1]:
                    for training in trial.modes:
                        twin.to(trial.dtype)
                        reason = _disagreement_in_mode(candidate, twin, trial, setting, training, device)
                        if reason is not None:
                            return f"{reason}, in {'train' if training else 'eval'} mode"
    except Exception as error:
        # Whatever a foreign module raises here says that it is not what its structure says.
        return f"it does not run on a small input as recognised: {(str(error) or repr(error)).splitlines()[0]}"
    return None


def _otherwise(why: str) -> None:
    raise TypeError(why)


def _disagreement_in_mode(
    candidate: Candidate,
    twin: nn.Module,
    trial: Trial,
    setting: Mapping[str, Any],
    training: bool,
    device: torch.device,
) -> str | None:
    results, states, changes, gradients = [], [], [], []
    differentiate = trial.gradients and training and setting is candidate.settings[0]
    names: list[str] = []
    calls: list[dict[str, bool]] = []
    for replaced in (False, True):
        run = copy.deepcopy(twin, {id(parameter): parameter for parameter in twin.parameters()}).train(training)
        vars(run).update(setting)
        if candidate.shorten is not None:
            candidate.shorten(run, trial.tokens)
        positional, named = candidate.arguments(RandomInputs(device, trial))
        given = (*positional, *named.values())
        inputs = [value for value in given if isinstance(value, Tensor) and value.is_floating_point()]
        if replaced:
            vars(run)["forward"] = types.MethodType(dispatch(candidate, _otherwise), run)
        watched = differentiate or trial.autocast
        called = _calls(run, candidate.bypassed if replaced else (), device.type) if watched else {}
        calls.append(called)
        before = _attributes(run)
        torch.manual_seed(0)
        try:
            with (
                torch.set_grad_enabled(differentiate),
                torch.autocast(device.type, torch.bfloat16, enabled=trial.autocast),
            ):
                for value in inputs:
                    value.requires_grad_(differentiate)
                result = run(*positional, **named)
        except Exception:
            if (trial.dtype == torch.float32 and not trial.autocast) or replaced:
                raise
            return None  # it does not run in half precision at all
        states.append(torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state())
        after = _attributes(run)
        changes.append({name for name in {**before, **after} if not _same(before.get(name), after.get(name))})
        if differentiate:
            leaves = {f"input {place}": value for place, value in enumerate(inputs)}
            leaves |= {name: value for name, value in run.named_parameters() if value.is_floating_point()}
            called.clear()
            gradients.append(_gradients(result, list(leaves.values())))
            names = list(leaves)
        results.append(result)
    if changes[0] != changes[1]:
        return f"only one of its own forward and the replacement changes {min(changes[0] ^ changes[1])}"
    more = calls[0].keys() - calls[1].keys()
    if differentiate and more:
        ran = min(more)
        return f"its own forward checkpoints activations ({ran} runs again in the backward), the replacement does not"
    for path, casts in calls[0].items() if trial.autocast else ():
        if not casts and calls[1].get(path, type(candidate.module.get_submodule(path)) is nn.Linear):
            return f"its own forward turns autocast off for {path}, the replacement does not"
    if not torch.equal(*states):
        return "its own forward and the replacement draw different random numbers"
    reduced = torch.backends.cuda.matmul.allow_tf32 and device.type == "cuda"
    tolerance = max(trial.tolerance, TF32_TOLERANCE if reduced else 0)
    if candidate.stand_ins and (trial.dtype != torch.float32 or trial.autocast):
        tolerance = 1e9  # stand-ins multiply rounding; structure and dtypes are compared all the same
    difference = _difference(*results)
    size = f"{trial.samples} x {trial.tokens} tokens in {str(trial.dtype).removeprefix('torch.')}"
    size += " under autocast" if trial.autocast else ""
    both = "its own forward and the replacement"
    if difference > tolerance:
        return f"{both} differ on a small input ({size}: {difference:.1e}, allowed {tolerance:.0e})"
    largest = max(map(_norm, gradients[0]), default=0.0) if gradients else 0.0
    for name, theirs, ours in zip(names, *gradients, strict=True) if gradients else ():
        if not _same_gradient(theirs, ours, largest):
            return f"{both} give {name} different gradients on a small input ({size})"
    return None


def _calls(module: nn.Module, bypassed: Collection[str], kind: str) -> dict[str, bool]:
    """Will hold the paths of the submodules that run from now on, and whether autocast is on for them on this kind of
    device; not of bypassed ones, which must be without hooks."""
    called: dict[str, bool] = {}
    for path, inner in module.named_modules():
        if path and path not in bypassed:

            def note(_: nn.Module, inputs: Any, path: str = path) -> None:
                called[path] = autocast_dtype_of(kind) is not None

            inner.register_forward_pre_hook(note)
    return called


def _gradients(result: Any, leaves: list[Tensor]) -> list[Tensor | None]:
    """Of a random combination of all results with respect to leaves; None where there is none."""
    generator = torch.Generator().manual_seed(2)
    outputs = [output for output in _tensors(result) if output.requires_grad]
    if not outputs:
        return [None] * len(leaves)
    weights = [torch.randn(output.shape, generator=generator, **_CPU).to(output) for output in outputs]
    return list(torch.autograd.grad(outputs, leaves, weights, allow_unused=True))


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (Mapping, list, tuple)):
        for entry in result.values() if isinstance(result, Mapping) else result:
            yield from _tensors(entry)


def _norm(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float(gradient.norm())


def _same_gradient(theirs: Tensor | None, ours: Tensor | None, largest: float) -> bool:
    if theirs is None or ours is None:
        return theirs is ours
    # Some gradients are zero but for rounding (of what softmax ignores), hence the largest one as a measure.
    return float((ours - theirs).norm()) <= GRADIENT_TOLERANCE * max(float(theirs.norm()), 1e-3 * largest)


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


def _randomised_copy(candidate: Candidate) -> nn.Module:
    """The module without hooks and replacements, in fp32, its parameters drawn at random and other tensors moved.

    A buffer of ones or zeros may be a factor or a term that stands still today.
    """
    generator = torch.Generator().manual_seed(1)
    shared = {id(parameter): parameter for parameter in candidate.module.parameters()}
    twin = copy.deepcopy(candidate.module, {**shared, **candidate.stand_ins})
    drawn: dict[int, nn.Parameter] = {}
    for module in twin.modules():
        for table in HOOKS:
            getattr(module, table).clear()
        uninstall(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                if id(parameter) not in drawn:
                    drawn[id(parameter)] = _draw(parameter, generator)
                module._parameters[name] = drawn[id(parameter)]
        others: tuple[dict[str, Any], ...] = (module._buffers, vars(module))
        for attributes in others:
            for name, value in attributes.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    attributes[name] = _move(value, generator)
    return twin.float()


def _draw(parameter: Tensor, generator: torch.Generator) -> nn.Parameter:
    # variance 1 per output for maps, 1/4 for vectors, which for norm weights is around 0 as well as any
    spread = (3 * parameter.shape[0] / parameter.numel()) ** 0.5 if parameter.dim() > 1 else 0.75**0.5
    values = torch.empty(parameter.shape, **_CPU)
    values.uniform_(-spread, spread, generator=generator)
    return nn.Parameter(values.to(parameter.device))


def _move(value: Tensor, generator: torch.Generator) -> Tensor:
    """What is positive (a variance) stays so."""
    factor, term = (torch.rand(value.shape, generator=generator, **_CPU).to(value) for _ in range(2))
    return value.detach() * (0.5 + factor) + 0.1 * term


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
