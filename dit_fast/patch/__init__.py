"""The ops, put into a model of another codebase: instance by instance, reversibly, parameters untouched.

handle = patch.apply(model)
print(handle.report)
handle.undo()
"""

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from torch import nn

from dit_fast import backend as backends
from dit_fast.errors import ConfigError, UserError
from dit_fast.models.sit import SiT
from dit_fast.options import nearest
from dit_fast.patch import diffusers_dit, diversedit, hunyuan, published
from dit_fast.patch.diversedit import SkipWiring
from dit_fast.patch.proof import Proofs
from dit_fast.patch.replacement import Forward, foreign_forward, install, installed, uninstall
from dit_fast.patch.rotary import Rotations

logger = logging.getLogger("dit_fast")

# What `ops` may name, and the public functions behind each.
OPS: dict[str, tuple[str, ...]] = {
    "adaln": ("layer_norm_modulate", "gate_residual", "gate_residual_modulate"),
    "gelu_mlp": ("gelu_mlp",),
    "long_skip": ("long_skip",),
    "qk_norm": ("qk_norm",),
}


@dataclass
class Report:
    """replaced: path of a module -> the op that runs it. refused: path -> why it stays as it is. not_on_cpu: those of
    the ops that run no call with CPU tensors."""

    replaced: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    not_on_cpu: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        lines = [f"{op}: {paths}" for op, paths in _by_value(self.replaced)]
        if self.not_on_cpu:
            left = ", ".join(sorted(self.not_on_cpu))
            lines.append(f"on a CPU the model's own forward stays for {left}: plain torch would run it, at no gain")
        return "\n".join(lines + [f"unchanged: {paths} ({why})" for why, paths in _by_value(self.refused)])


def _by_value(named: dict[str, str], shown: int = 3) -> Iterator[tuple[str, str]]:
    for value in dict.fromkeys(named.values()):
        paths = [path or "the model" for path in named if named[path] == value]
        more = f", ... ({len(paths)} in all)" if len(paths) > shown else ""
        yield value, ", ".join(paths[:shown]) + more


@dataclass
class Handle:
    """The result of `apply`: what was replaced, and `undo`."""

    report: Report
    _installed: list[tuple[str, nn.Module, Forward]] = field(repr=False)

    def __str__(self) -> str:
        return str(self.report)

    def undo(self) -> None:
        """Gives every module its own forward back; nothing is left on it. A second call does nothing.

        What something else has put a forward of its own over is left as it is: it may call the patched one. All others
        are undone, and UserError names it and whose that forward is; take it off and call undo() again.
        """
        self._installed = [entry for entry in self._installed if not uninstall(*entry[1:])]
        if self._installed:
            path, module, _ = self._installed[0]
            more = f" (and {len(self._installed) - 1} more)" if len(self._installed) > 1 else ""
            raise UserError(
                f"undo: the forward of {path or 'the model'}{more} is now {foreign_forward(module)}; all else is undone"
                ". Take that off (accelerate: unwrap_model(model, keep_fp32_wrapper=False)), then call undo() again"
            )


def apply(
    model: nn.Module,
    ops: Collection[str] | None = None,
    backend: str = "auto",
    skip_wiring: SkipWiring | None = None,
) -> Handle:
    """Lets the ops run the modules of `model` that they can take.

    Taken: blocks, heads, MLPs, attention with QK-norm or rotary positions and the long skips of the published DiT, SiT,
    REPA, DiverseDiT and LightningDiT code, and of diffusers' DiT and HunyuanDiT. Only the instance's `forward` changes:
    parameters, buffers, state_dict, hooks on the replaced modules and train or eval mode stay. Each replacement is
    first compared with the module's own forward (see `dit_fast.patch.proof`); what cannot be taken stays and is named
    in `handle.report.refused` and in the log. Applied again, it changes nothing, and the second handle undoes as well.
    ops: names out of OPS; None for all, of which those that plain torch runs on a CPU leave calls with CPU tensors to
    the model's own forward, wherever the model was at `apply` (`handle.report.not_on_cpu`). backend: that of every op.
    skip_wiring: of a DiverseDiT ("input", "output"); None finds it out by running the model on a small input.
    Raises ConfigError for an unknown op, backend or wiring, and for a wiring that says nothing of this model; UserError
    for what is no module, and where nothing can be replaced.
    """
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise UserError(f"patch.apply: model must be a torch.nn.Module, not {given}")
    chosen = _check_ops(ops)
    diversedit.check_wiring(skip_wiring)
    if any(isinstance(module, SiT) for module in model.modules()):
        raise UserError("patch.apply: a dit_fast SiT uses the ops already; patch models of other codebases")
    _check_backend(model, chosen, backend)
    left = _plain_on_cpu() if ops is None and backend == "auto" else frozenset()
    report, done, accepted, proofs, rotations = Report(), [], [], Proofs(), Rotations(model)
    found: set[str] = set()  # the ops that something here could be run by, chosen or not
    for path, module in model.named_modules():
        mark = installed(module)
        if mark is not None:
            if mark.backend != backend:
                raise UserError(
                    f"patch.apply: '{path}' is patched with backend '{mark.backend}'; undo that before '{backend}'"
                )
            found.add(mark.op)
            report.replaced[path] = mark.op
            report.not_on_cpu |= {mark.op} if mark.not_on_cpu else set()
            done.append((path, module, vars(module)["forward"].__func__))
            continue
        candidates = (
            *published.find(path, module, backend, proofs, rotations),
            *diversedit.find(path, module, backend, skip_wiring, proofs),
            *diffusers_dit.find(path, module, backend),
            *hunyuan.find(path, module, backend),
        )
        for candidate in candidates:
            found.add(candidate.op)
            if candidate.op not in chosen:
                continue
            reason = proofs.refusal(candidate)
            if reason is None:
                accepted.append(candidate)
            else:
                report.refused[path] = f"{candidate.op}: {reason}"
    if skip_wiring is not None and "long_skip" not in found & {*chosen}:
        why = "ops leaves long_skip out" if "long_skip" in found else f"{type(model).__name__} has none"
        raise ConfigError(f"patch.apply: skip_wiring='{skip_wiring}' is for long skips, and {why}; drop it")
    if not accepted and not done:
        raise UserError(f"patch.apply: nothing to replace in {type(model).__name__}; {_why_nothing(report, found)}")
    said: set[str] = set()
    for candidate in accepted:
        forward = install(candidate, backend, said, candidate.op in left)
        done.append((candidate.path, candidate.module, forward))
        report.replaced[candidate.path] = candidate.op
        report.not_on_cpu |= {candidate.op} & left
    for path, reason in report.refused.items():
        logger.warning("patch.apply: %s stays as it is: %s", path or "the model", reason)
    return Handle(report, done)


def _check_ops(ops: Collection[str] | None) -> tuple[str, ...]:
    if ops is None:
        return tuple(OPS)
    names = (ops,) if isinstance(ops, str) else tuple(ops) if isinstance(ops, Collection) else (ops,)
    for name in names:
        if name not in OPS:
            raise ConfigError(f"patch.apply: unknown op '{name}'{nearest(str(name), OPS)}")
    if not names:
        raise ConfigError(f"patch.apply: ops is empty; give some of {', '.join(OPS)}, or None for all")
    return names


def _check_backend(model: nn.Module, ops: tuple[str, ...], backend: str) -> None:
    if not isinstance(backend, str):
        raise ConfigError(f'patch.apply: backend must be a name such as "auto", not {type(backend).__name__}')
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.device.type != "meta":
        for name in (function for op in ops for function in OPS[op]):
            backends.choose(name, backend, parameter.device.type)


def _plain_on_cpu() -> frozenset[str]:
    """The ops that plain torch runs there. Measured on one core, of such models of two sizes, fp32 and bf16: with
    qk_norm alone a step is 0.96 to 1.0 times as fast, with long_skip alone 1.0, with all others 1.1."""
    return frozenset(
        op for op, names in OPS.items() if all(backends.choose(name, "auto", "cpu") == "torch" for name in names)
    )


def _why_nothing(report: Report, found: set[str]) -> str:
    if report.refused:
        path, reason = next(iter(report.refused.items()))
        path = f"'{path}'" if path else "the model"
        more = f" (and {len(report.refused) - 1} more)" if len(report.refused) > 1 else ""
        return f"{path} cannot be taken: {reason}{more}"
    if found:
        return f"what it has is for {', '.join(sorted(found))}, which ops leaves out"
    looked_for = (published.LOOKED_FOR, diversedit.LOOKED_FOR, diffusers_dit.LOOKED_FOR, hunyuan.LOOKED_FOR)
    return "looked for " + "; ".join(looked_for)
