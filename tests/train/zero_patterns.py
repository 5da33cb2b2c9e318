"""What a training loss may do, one method each, the methods and objectives that there are, and the plain loop that says
what should come of them.

Nothing here knows an engine: forward, backward, clip and update are written out.
"""

import copy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import nn
from torch.func import functional_call, jvp

from dit_fast.methods import METHODS, Method, Term
from dit_fast.models import build_model
from dit_fast.objectives import OBJECTIVES
from dit_fast.train.loss import TrainingLoss
from tests.helpers.encoder_weights import toy_encoder
from tests.helpers.tiny_vae import toy_vae

LR, EPS, BETAS, WEIGHT_DECAY, EMA = 5e-3, 1e-2, (0.9, 0.999), 0.01, 0.9


class Pattern(Method):
    """Trains the model alone. options, recompute: of the model.

    clip: of the whole gradient, 0 = none, as it hides a wrong scale.

    split: what the plain loop takes a loss of, the "whole" batch, one "micro"-batch of all ranks, or the "share" of a
    rank in it; the gradient is the mean.
    """

    name, blocks = "pattern", frozenset({0, 1})
    options: ClassVar[dict] = {}
    recompute = "none"
    clip, split, objective = 0.0, "whole", "flow"

    @classmethod
    def bind(cls, model):
        return [cls(model)]

    def __init__(self, model):
        self.model = model

    def terms(self, context):
        return {f"pattern/{i}": Term(value) for i, value in enumerate(self.values(context))}

    def values(self, context):
        return []


class Headed(Pattern):
    def __init__(self, model):
        super().__init__(model)
        self.head = nn.Linear(model.hidden_size, model.hidden_size)
        model.add_head("head", self.head)


class Clipped(Pattern):
    clip = 2.0


class Recomputed(Pattern):
    recompute = "full"


class Twice(Headed):
    def values(self, context):
        return [self.head(self.head(context.features[1])).square().mean()]


class Forwards(Pattern):
    def values(self, context):
        times = [(context.t - shift).clamp(0, 1) for shift in (0.1, 0.3)]
        return [(context.model(context.noised_at(t), t, context.y) - context.target).square().mean() for t in times]


class Depths(Pattern):
    """A further forward that ends after another block in each micro-batch."""

    split = "micro"

    def values(self, context):
        depth = (int(context.batch["micro"][0]) + context.number) % 2
        _, found = context.model(context.noised, context.t, context.model.null(context.y), [depth], stop=depth)
        return [found[depth].square().mean()]


class WithoutGradient(Pattern):
    def state(self, x, batch, key):
        with torch.no_grad():
            self.before = self.model(x, torch.zeros(len(x)), batch["label"])
        return x

    def values(self, context):
        with torch.no_grad():
            after = self.model(context.noised, context.t, self.model.null(context.y))
        return [(context.prediction - after - self.before).square().mean()]


class SomeSteps(Headed):
    """A head that has a gradient in the first step alone."""

    def used(self, context):
        return context.number == 0

    def values(self, context):
        return [self.head(context.features[1]).square().mean()] if self.used(context) else []


class SomeMicroBatches(SomeSteps):
    split = "micro"

    def used(self, context):
        return (int(context.batch["micro"][0]) + context.number) % 2 == 0


class SomeRanks(SomeSteps):
    """Used where the micro-batch begins at an even position: on the first of two ranks."""

    def used(self, context):
        return int(context.batch["position"][0]) % 2 == 0


class Teacher(Pattern):
    """A moving copy of the model outside of it."""

    def __init__(self, model):
        super().__init__(model)
        self.teacher = copy.deepcopy(model).requires_grad_(False)

    def values(self, context):
        with torch.no_grad():
            _, found = self.teacher(context.noised, context.t, context.y, [1], stop=1)
        return [(context.features[0] - found[1]).square().mean()]

    def tensors(self):
        return dict(self.teacher.named_parameters())

    def after_update(self, model, applied):
        for mine, parameter in zip(self.teacher.parameters(), model.parameters(), strict=True):
            mine.lerp_(parameter, 0.25 * applied)


class TeacherInside(Headed):
    """A moving copy of a head among the model's frozen parameters."""

    def __init__(self, model):
        super().__init__(model)
        self.teacher = copy.deepcopy(self.head).requires_grad_(False)
        model.add_head("teacher", self.teacher)

    def values(self, context):
        return [(self.head(context.features[0]) - self.teacher(context.features[1])).square().mean()]

    def after_update(self, model, applied):
        for mine, parameter in zip(self.teacher.parameters(), self.head.parameters(), strict=True):
            mine.lerp_(parameter, 0.25 * applied)


class Groups(Twice):
    """A group with its own rate, decay and norm; one with its own rate, clipped with all others."""

    clip = 2.0

    def param_groups(self):
        own = {"params": list(self.head.parameters()), "lr": LR / 2, "weight_decay": 0.0, "clip": 0.02}
        return [own, {"params": list(self.model.blocks[0].parameters()), "lr": LR * 2}]


class SecondDerivative(Headed):
    """The gradient of a head with respect to its input is part of the loss."""

    functional = True

    def values(self, context):
        x = context.features[1].detach().requires_grad_()
        energy = torch.tanh(self.head(x)).square().sum()
        return [torch.autograd.grad(energy, x, create_graph=True)[0].square().mean()]


class Tangent(Pattern):
    """A derivative in forward mode along the input, with parameters handed in."""

    functional = True

    def values(self, context):
        weights = {name: parameter.detach() for name, parameter in context.model.named_parameters()}
        with torch.no_grad():
            move = jvp(
                lambda x: functional_call(context.model, weights, (x, context.t, context.y)),
                (context.noised,), (context.target,),
            )[1]  # fmt: skip
        return [(context.prediction - move).square().mean()]


class OwnBackward(Pattern):
    def values(self, context):
        context.prediction.sum().backward(retain_graph=True)
        return []


class Statistics(Pattern):
    """Batch norm: each forward uses and keeps what its own micro-batch says."""

    split = "share"

    def __init__(self, model):
        super().__init__(model)
        self.norm = nn.BatchNorm1d(model.hidden_size)
        model.add_head("norm", self.norm)

    def values(self, context):
        return [(self.norm(context.features[0].flatten(0, 1)) - 1).square().mean()]


PATTERNS = {
    "nothing else": Pattern,
    "gradient clipped": Clipped,
    "blocks recomputed": Recomputed,
    "module twice": Twice,
    "several forwards": Forwards,
    "depth by micro-batch": Depths,
    "forwards without gradient": WithoutGradient,
    "unused in some steps": SomeSteps,
    "unused in some micro-batches": SomeMicroBatches,
    "unused on some ranks": SomeRanks,
    "teacher outside": Teacher,
    "teacher inside": TeacherInside,
    "groups": Groups,
    "second derivative": SecondDerivative,
    "forward mode": Tangent,
    "own backward": OwnBackward,
    "batch norm": Statistics,
}


@dataclass(frozen=True)
class Real:
    """Methods and an objective of the trainer; the rest is as for a `Pattern`."""

    methods: dict = field(default_factory=dict)
    objective: str = "flow"
    options: dict = field(default_factory=dict)
    recompute: str = "none"
    split: str = "whole"
    clip: float = 0.0

    def bind(self, model):
        data = SimpleNamespace(field=lambda name: SimpleNamespace(shape=FIELDS[name]))
        bound = []
        for name, options in self.methods.items():
            options = {key: value() if callable(value) else value for key, value in options.items()}
            bound.append(METHODS[name](METHODS[name].Config(**options), model, data))
        teacher = copy.deepcopy(model).requires_grad_(False).eval()
        for method in bound:
            method.prepare(lambda path, weights: (teacher, ""))
        return bound

    @property
    def functional(self):
        return any(part.functional for part in (OBJECTIVES[self.objective], *map(METHODS.get, self.methods)))


FIELDS = {"features": (4, 6), "class_token": (6,), "image": (3, 16, 16)}
ALL_PAIRS = {"pairs": "all", "weight": "continuous", "low": 0.0}
FOLLOWED = {
    "encoder_depth": 1, "projector_width": 8, "student_depths": (1, 2), "teacher_depths": (1, 2), "stop_step": 2,
    "encoders": (f"dinov2-vit-b:{toy_encoder()}",),
}  # fmt: skip
GUIDED = {"student_depth": 1, "teacher_depth": 2, "guidance": 2.0, "projector_width": 8, "t_low": 0.0, "stop_step": 2}
END_TO_END = {
    "vae": lambda: f"diffusers:{toy_vae()}", "encoder_depth": 1, "projector_width": 8, "perceptual_weight": 0.0,
    "discriminator_width": 4, "discriminator_layers": 2, "vae_lr": LR / 4, "vae_clip": 1.0, "discriminator_clip": 0.3,
}  # fmt: skip
REALS = {
    "DiverseDiT": Real({"diversedit": ALL_PAIRS}, split="share"),
    "DiverseDiT, global": Real({"diversedit": {**ALL_PAIRS, "scope": "global"}}, split="micro"),
    "REPA": Real({"repa": {"encoder_depth": 1, "projector_width": 8}}),
    "iREPA": Real({"repa": {"encoder_depth": 1, "projector": "conv", "spatial_norm": 0.6, "weight": 1.0}}),
    "REG": Real({"reg": {"encoder_depth": 1, "projector_width": 8, "stop_step": 2}}, options={"class_token": 6}),
    "HASTE": Real({"haste": FOLLOWED}),
    "REPA-E": Real({"repa_e": END_TO_END}, split="micro"),
    "SRA": Real({"sra": {"student_depth": 1, "teacher_depth": 2, "decay": 0.5, "stop_step": 2}}),
    "Self-Transcendence, stage 1": Real({"structure_guidance": {"depth": 1, "projector_width": 8}}),
    "Self-Transcendence, stage 2": Real({"self_transcendence": GUIDED}),
    "Dispersive Loss": Real({"dispersive": {"weight": 5.0}}, split="share"),
    "Dispersive Loss, global": Real({"dispersive": {"weight": 5.0, "scope": "global"}}, split="micro"),
    "internal guidance": Real({"internal_guidance": {"weight": 2.0}}, options={"auxiliary_depth": 1}),
    "contrastive flow matching": Real({"contrastive_flow": {"weight": 0.5}}, split="share"),
    "LayerSync": Real({"layersync": {"student_depths": (1,), "teacher_depths": (2,)}}),
    "SRA 2": Real({"sra2": {"depth": 1, "head_width": 8}}),
    "DDPM": Real(objective="ddpm", options={"name": "DiT-Nano/2"}),
    "mean flow": Real(objective="mean_flow", options={"times": 2}),
    "improved mean flow": Real(
        objective="improved_mean_flow", options={"times": 2, "velocity_head": True, "guidance_condition": True}
    ),
    "DiverseDiT on LightningDiT": Real(
        {"diversedit": ALL_PAIRS}, options={"name": "LightningDiT-Nano/1", "adaln_shift": False}, split="share"
    ),
}
CASES = {**PATTERNS, **REALS}


def build(name, precision):
    """The training loss of a case with a small model, the same at every call, and its methods."""
    case = CASES[name]
    options = {"input_size": 4, "in_channels": 12, "num_classes": 3, "skip_wiring": "input", "qk_norm": True}
    sizes = {"hidden_size": 16, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    model = build_model(**{"name": "SiT-Nano/2", **options, **sizes, **case.options})
    model.activation_checkpointing = case.recompute
    for parameter in model.parameters():  # zero-initialised gates would leave most gradients at zero
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    methods = case.bind(model)
    objective = OBJECTIVES[case.objective](OBJECTIVES[case.objective].Config(), model)
    return TrainingLoss(model, objective, methods, seed=3, label_dropout=0.1, precision=precision), methods


def plain(name, precision, steps):
    """Trains a case on steps of lists of micro-batches, each a list of the ranks' shares. Returns weights, moments and
    averages by kind and name, and what the methods hold.

    AdamW (arXiv 1711.05101), gradients clipped by their norm, an average of the weights after each update. In bf16 the
    losses of a whole batch are the means of the shares', so that roundings before the first update are the same.
    """
    case, (loss, methods) = CASES[name], build(name, precision)
    named = {name: p for name, p in loss.model.named_parameters() if p.requires_grad}
    first, second = ({name: torch.zeros_like(p) for name, p in named.items()} for _ in range(2))
    averages = {name: p.detach().clone() for name, p in named.items()}
    of = {id(p): group for method in methods for group in method.param_groups() for p in group["params"]}
    for number, micro_batches in enumerate(steps):
        shares = [share for ranks in micro_batches for share in ranks]
        parts = {
            "whole": [joined(shares)],
            "micro": [joined(ranks) for ranks in micro_batches],
            "share": shares,
        }["share" if precision == "bf16" and case.split == "whole" else case.split]
        gradients = {name: torch.zeros_like(p) for name, p in named.items()}
        for part in parts:
            value, _ = loss(part, number)
            found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
            for name, gradient in zip(named, found, strict=True):
                if gradient is not None:
                    gradients[name] += gradient / len(parts)
        clips = {name: of.get(id(p), {}).get("clip", case.clip) for name, p in named.items()}
        for bound in set(clips.values()) - {0.0}:
            members = [gradients[name] for name in named if clips[name] == bound]
            norm = torch.sqrt(sum(g.square().sum() for g in members))
            for g in members:
                g *= min(1.0, bound / float(norm))
        with torch.no_grad():
            for name, p in named.items():
                group = of.get(id(p), {})
                lr, decay, g = group.get("lr", LR), group.get("weight_decay", WEIGHT_DECAY), gradients[name]
                first[name] += (1 - BETAS[0]) * (g - first[name])
                second[name] += (1 - BETAS[1]) * (g * g - second[name])
                m, v = first[name] / (1 - BETAS[0] ** (number + 1)), second[name] / (1 - BETAS[1] ** (number + 1))
                p -= lr * (decay * p + m / (v.sqrt() + EPS))
                averages[name] += (1 - EMA) * (p - averages[name])
            for method in methods:
                if method.active(number):
                    method.after_update(loss.model, torch.ones(()))
    weights = {name: x.detach() for name, x in loss.model.state_dict().items() if x.is_floating_point()}
    held = {f"{method.name}.{name}": x.detach() for method in methods for name, x in method.tensors().items()}
    return {"model": weights, "ema": averages, "exp_avg": first, "exp_avg_sq": second, "rest": held}


def joined(batches):
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def differences(found, expected):
    """|found - expected| / |expected| of each kind of state."""
    result = {}
    for kind, tensors in expected.items():
        assert found[kind].keys() == tensors.keys(), kind
        if tensors:
            x, y = (torch.cat([each[name].double().flatten() for name in tensors]) for each in (found[kind], tensors))
            result[kind] = float((x - y).norm() / y.norm())
    return result
