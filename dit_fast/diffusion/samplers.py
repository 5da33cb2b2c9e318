"""`sample`: a solver on the guided velocity of a model, with noise from one source, in fixed chunks."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dit_fast.diffusion.checks import check_dense, check_labels, check_order, check_t_eps, path_of, predicted_by
from dit_fast.diffusion.conversions import T_EPS, Diffusion, Prediction
from dit_fast.diffusion.ddpm import Noise, spaced_steps
from dit_fast.diffusion.grids import time_grid
from dit_fast.diffusion.guidance import Bounds, Channels, Decision, Guidance, Velocity, described, is_number, shapes_of
from dit_fast.diffusion.kept import KeptCondition
from dit_fast.diffusion.paths import Path
from dit_fast.diffusion.reverse import LastStep
from dit_fast.diffusion.solvers import SOLVERS, Draw, Field, Follows
from dit_fast.errors import UserError
from dit_fast.models import Output
from dit_fast.ops.draws import Key
from dit_fast.options import check_choice
from dit_fast.philox import Stream, leaf_stream
from dit_fast.tree import Tree, each, image, label, leaves, like

MOST_STEPS = Stream.METHOD - Stream.SAMPLER  # every step draws from a Philox stream of its own
MOST_ROWS = 1 << 16  # of one batch
BELOW_NOISE = 1 - 1e-6  # an upper end of guidance that leaves out t = 1 alone
KINDS: dict[Follows, str] = {  # of models that give such a field
    "velocity": "a model with 1 time",
    "mean_velocity": "a model with 2 times",
    "noise": "a model that learns a variance",
}
CHOICES = {"diffusion": Diffusion, "last_step": LastStep}  # of solvers' options


def initial_noise(seed: int, index: Tensor, shape: tuple[int, ...] | Mapping[str, tuple[int, ...]]) -> Tree:
    """Starting noise of the images `index` (int64 [N]): float64 [N, *shape]; row k is a function of (seed, k) alone.

    shape: of the image, or of each leaf by name, whose numbers come from streams of their own.
    """
    named = shape if isinstance(shape, Mapping) else {"image": shape}
    drawn = each(Tensor.double, Key(seed, index).leaves(Stream.INITIAL_NOISE, named))
    return drawn if named is shape else image(drawn)


def sample(
    model: Callable[..., Output],
    noise: Tree,
    y: Tensor | Mapping[str, Tensor | float],
    sampler: str = "euler",
    num_steps: int = 50,
    cfg_scale: float = 1.0,
    guidance_low: float = 0.0,
    guidance_high: float = 1.0,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    index: Tensor | None = None,
    path: Path | str | None = None,
    chunk: int = 64,
    cfg_channels: Channels | None = None,
    class_token_cfg_scale: float | None = None,
    draws: Sequence[Tree] | Tensor | None = None,
    field: Callable[[Any, Any, Guidance], Field] | None = None,
    prediction: Prediction | None = None,
    null_label: int | None = None,
    time_range: Sequence[float] | None = None,
    times: Sequence[float] | Tensor | None = None,
    time_shift: float | None = None,
    diffusion: Diffusion | None = None,
    diffusion_norm: float | None = None,
    last_step: LastStep | None = None,
    last_step_size: float | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    t_eps: float = T_EPS,
    guidance_bounds: Bounds = "inclusive",
    heun_guidance: Decision = "first",
    ig_scale: float = 1.0,
    ig_low: float = 0.0,
    ig_high: float = 1.0,
    state_refresh: int | None = None,
) -> Tree:
    """Latents float64 [N, C, H, W] from `noise` [N, C, H, W] (any float dtype) and labels y int64 [N].

    A model that is told more than labels (improved mean flow) takes y = {"label": [N], "omega": ..., "t_min": ...,
    "t_max": ...} with numbers or [N].

    noise may be a tree of the leaves that the model denoises together, {"image": ..., "class_token": [N, Z]}; then so
    is the result. A model in training mode is evaluated in eval mode and put back.

    sampler: a name of `solvers.SOLVERS`, for the ODE "euler"; "heun" (trapezoid; Euler on the step that reaches t = 0,
    unless that is the only one and begins below t = 1); "heun2" (trapezoid throughout); "rk4" (3/8 rule); "dopri5"
    (torchdiffeq; its steps are its own, num_steps decides nothing, atol 1e-6 and rtol 1e-3 bound its error); for the
    SDE "sde" (Euler-Maruyama) and "sde_heun"; "mean_flow" (Euler on the mean velocity of a model with two times, which
    gets t [N, 2] = (t, s)). For a model that predicts noise and a variance, [N, 2C, H, W] at steps t int64 [N] (DiT):
    "ddpm", ancestral, and "ddim" without noise, in num_steps of its 1000 steps; guidance is that of the noise, its
    interval one of t / 1000.
    path, prediction: what the model was trained on, and what it returns: "velocity", "score", "noise", or "x", whose
    velocity is (x_t - x) / max(t, t_eps) on the linear path; a mean velocity may be given as x too. By default what
    `model.path` and `model.prediction` say ("linear", "velocity" where they say nothing). "mean_flow" knows the linear
    path alone, "ddpm" and "ddim" the noise of their own steps.

    Times: num_steps equal steps (SDE: num_steps - 1 noisy ones, and a last one) through time_range = (from, to), from
    noise to data, by default (1, 0), or inside of it where the velocity is infinite at an end
    (`conversions.field_range`); an SDE's noisy steps end at last_step_size (0.04). time_shift: equal steps under
    `times.shift_times`. times: an explicit grid instead of num_steps (SDE: of the noisy steps).

    SDE, dx = (v - w score) dt + sqrt(2 w) dW: diffusion is a form of `conversions.diffusion_coefficient`, with
    diffusion_norm; by default REPA's w = t on every path. last_step: "mean" along the drift, "euler" along v, "tweedie"
    the expected data, "none"; of length last_step_size, by default all that is left.

    Guidance: v = v_null + cfg_scale (v_label - v_null) while guidance_low <= t <= guidance_high, for every finite
    cfg_scale; 1 is the label alone (one model row per sample), 0 the null label. null_label: by default
    `model.null_label`. cfg_channels: "all", or "first_three" as the released samplers of DiT and SiT; by default what
    `model.cfg_channels` says ("all" where it says nothing). class_token_cfg_scale: scale of the class token, by default
    the image's. guidance_bounds: "exclusive" guides while low < t < high, where high = 1 is no bound (JiT),
    unless `model.guides_noise` is false (DDT).
    heun_guidance: whether the "first" evaluation of a step decides for all (REPA), or "each" for itself (JiT); dopri5's
    always do.
    ig_scale: internal guidance of a model with an auxiliary output, v = v_aux + ig_scale (v - v_aux) while
    ig_low <= t <= ig_high, both included, for each branch of the guidance above and before it; any finite number, 1 is
    off.

    Randomness of the SDE and of "ddpm": `generator` (per noisy step one standard normal of the state's shape, in order,
    leaf by leaf, drawn in float64, for "ddpm" in float32), or `draws` (those states of noise themselves, one for each
    noisy step), or `seed` and `index` int64 [N] (Philox per seed, index and step).

    state_refresh: the encoder of a model that has one (DDT) runs only in every so many-th step, from the first on; the
    other steps keep its condition, with guidance each half its own. A step of several evaluations runs it in all.

    field: what the solver follows, from (model, y, guidance); an `Objective.field`. By default the model's velocity.

    With seed and index the work is cut into the fixed chunks [c * chunk, (c + 1) * chunk) of the index space; index k
    is always row k % chunk of a batch of `chunk` rows, and rows that fill it up are computed on zeros. Image k is then
    the same bytes however the indices are spread over calls and ranks; hand out whole chunks, so that no row is wasted.
    dopri5, whose steps depend on all rows of a batch, then computes one row at a time. Otherwise all N rows are one
    batch.

    Raises UserError for an unknown sampler or path, an option (or a path) that the sampler does not take, a number out
    of range, another path or prediction than the model's own, times at which the velocity is infinite, guidance of a
    model without a null label, labels that the model does not have (where it says num_classes; its null label is one it
    has), a sampler for another kind of model, noise that is not finite, shapes that do not fit, several or no sources
    of randomness where one is needed, and repeated indices.
    """
    given = {
        "diffusion": diffusion,
        "diffusion_norm": diffusion_norm,
        "last_step": last_step,
        "last_step_size": last_step_size,
        "atol": atol,
        "rtol": rtol,
    }
    options = check_options(sampler, num_steps, chunk, seed, given)
    solver = SOLVERS[sampler]
    check_refresh(state_refresh, sampler)
    count = _check_noise(noise)
    if sum(source is not None for source in (generator, draws, index if seed is None else seed)) > 1:
        raise UserError("give one source of noise: generator=, or draws=, or seed= and index=; not both")
    if (seed is None) != (index is None):
        raise UserError("seed= and index= belong together; one of them is missing")
    if solver.noisy and generator is None and seed is None and draws is None:
        raise UserError(f"sampler '{sampler}' draws noise; give generator=, or draws=, or seed= and index=")
    if not isinstance(generator, torch.Generator | None):
        raise UserError(f"generator must be a torch.Generator, not {described(generator)}")
    check_fits(sampler, model)
    path, prediction = path_of(model, path), predicted_by(model, prediction)
    check_used(sampler, path, prediction)
    if null_label is not None:
        check_whole("null_label", null_label, 0, 2**31 - 1)
    if t_eps != 0:  # a range of times may leave out t = 0
        check_t_eps(t_eps, prediction == "x" and field is None)
    grid = time_grid(solver, num_steps, path, prediction, options, time_range, times, time_shift)
    if solver.noisy and draws is not None:
        _check_draws(draws, noise, len(grid) - 1)
    channels: Channels = getattr(model, "cfg_channels", "all") if cfg_channels is None else cfg_channels
    if guidance_bounds == "exclusive" and guidance_high == 1 and not getattr(model, "guides_noise", True):
        guidance_high = BELOW_NOISE
    guidance = Guidance(
        cfg_scale,
        guidance_low,
        guidance_high,
        channels,
        class_token_cfg_scale,
        guidance_bounds,
        heun_guidance,
        ig_scale,
        ig_low,
        ig_high,
    )
    if class_token_cfg_scale is not None and "class_token" not in leaves(noise):
        raise UserError(
            f"class_token_cfg_scale={class_token_cfg_scale} is for a class token, and noise has none; drop it"
        )
    conditions = _conditions(model, y, count)
    state, batch = each(lambda leaf: leaf.double(), noise), 1 if solver.adaptive else chunk

    def solved(x: Tree, told: Tree, draw: Draw) -> Tree:
        kept = None if state_refresh is None else KeptCondition(model, state_refresh, len(label(told)))
        followed = model if kept is None else kept
        if field:
            v = field(followed, told, guidance)
        elif solver.follows == "noise":
            v = Noise(followed, told, guidance, null_label)
        else:
            means = 2 if solver.follows == "mean_velocity" else 1
            v = Velocity(followed, told, guidance, means, prediction, path, t_eps, null_label)
        for step, after in enumerate(solver(v, x, grid, path, draw, **options), 1):
            x = after
            if kept is not None:
                kept.step = step
        return x

    with torch.no_grad(), _evaluating(model):
        if seed is None or index is None:
            return solved(
                state,
                conditions,
                _from_generator(generator, state, solver.draws) if draws is None else _given(draws, state),
            )
        result = each(torch.empty_like, state)
        for first, (rows, places) in _chunks(index, count, batch).items():
            x = each(lambda leaf: leaf.new_zeros(batch, *leaf.shape[1:]), state)
            told = each(lambda leaf: leaf.new_full((batch,), leaf.is_floating_point()), conditions)  # omega divides
            _copy(state, rows, x, places)
            _copy(conditions, rows, told, places)
            numbers = torch.arange(first, first + batch, dtype=torch.int64, device=index.device)
            _copy(solved(x, told, _philox(seed, numbers, state)), places, result, rows)
        return result


def check_options(
    sampler: str,
    num_steps: int,
    chunk: int = 1,
    seed: int | None = None,
    options: Mapping[str, float | str | None] = MappingProxyType({}),
) -> dict[str, float | str]:
    """Those of the solver's own options that were given (are not None).

    Raises UserError naming the option, for an unknown sampler, a number out of range, and an option that this sampler
    does not take.
    """
    if sampler not in SOLVERS:
        raise UserError(f"unknown sampler '{sampler}'; valid: {', '.join(SOLVERS)}")
    check_whole("num_steps", num_steps, 1, MOST_STEPS)
    if SOLVERS[sampler].follows == "noise":
        spaced_steps(num_steps)
    check_whole("chunk", chunk, 1, MOST_ROWS)
    if seed is not None:
        check_whole("seed", seed, 0, 2**64 - 1)
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if name not in SOLVERS[sampler].options:
            kind = SOLVERS[sampler].follows
            fitting = ", ".join(other for other, it in SOLVERS.items() if name in it.options and it.follows == kind)
            raise UserError(f"sampler '{sampler}' takes no {name}; drop it" + f", or use {fitting}" * bool(fitting))
        if name in CHOICES:
            check_choice(name, value, CHOICES[name])
        elif not is_number(value) or not math.isfinite(value) or not value >= 0:  # type: ignore[arg-type, operator]
            raise UserError(f"{name}={value!r} must be a finite number, 0 or more")
    for name in ("atol", "rtol"):
        if given.get(name) == 0:
            raise UserError(f"{name}=0 asks for more than floating point has; give a number above 0")
    none, size = given.get("last_step") == "none", given.get("last_step_size")
    if size is not None and none != (size == 0):
        raise UserError(f"last_step_size={size} does not fit last_step='{given.get('last_step', 'mean')}'; 0 is 'none'")
    return given


def check_refresh(state_refresh: int | None, sampler: str) -> None:
    """Raises UserError for a number that is none, and for a sampler without steps to count."""
    if state_refresh is None:
        return
    check_whole("state_refresh", state_refresh, 1, MOST_STEPS)
    if SOLVERS[sampler].adaptive:
        raise UserError(f"state_refresh counts steps, and sampler '{sampler}' takes its own; drop it, or use euler")


def check_fits(sampler: str, model: object) -> None:
    """Raises UserError where a solver cannot sample this model; one that says nothing of itself passes."""
    follows, times = SOLVERS[sampler].follows, getattr(model, "times", None)
    known: Follows | None = {1: "velocity", 2: "mean_velocity"}.get(times)  # type: ignore[assignment, arg-type]
    gives = "noise" if getattr(model, "learns_variance", False) else known
    if gives not in (follows, None):
        fitting = ", ".join(name for name, solver in SOLVERS.items() if solver.follows == gives)
        raise UserError(f"sampler '{sampler}' does not fit {KINDS[gives]}; use {fitting}")


def check_used(sampler: str, path: Path, prediction: Prediction) -> None:
    """Raises UserError for a path and a prediction that a solver would not use; the defaults of `sample` pass."""
    follows = SOLVERS[sampler].follows
    if follows == "mean_velocity" and path.name != "linear":
        raise UserError(f"sampler '{sampler}' is for mean velocities on the linear path, not '{path.name}'; drop path=")
    if follows != "noise":
        return
    if path.name not in ("linear", "vp"):  # its steps are some of vp's
        raise UserError(f"sampler '{sampler}' has DDPM's own steps, not the {path.name} path; drop path=")
    if prediction not in ("velocity", "noise"):
        raise UserError(f"sampler '{sampler}' is for a model that predicts noise, not '{prediction}'; drop prediction=")


def check_whole(name: str, value: object, least: int, most: int) -> None:
    """Raises UserError unless the value is a whole number in [least, most]."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) <= most:
        raise UserError(f"{name}={value!r} must be a whole number from {least} to {most}")


def _check_noise(noise: Tree) -> int:
    """The number of rows. Raises UserError unless every leaf holds that many rows of finite floats."""
    named = leaves(noise) if isinstance(noise, Tensor | dict) else {}
    sound = all(isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1 for leaf in named.values())
    if not named or not sound:
        raise UserError(f"noise must be a floating point tensor [N, C, ...], not {described(noise)}")
    for name, leaf in named.items():
        leaf_stream(name, Stream.SAMPLER)
        check_dense("noise", leaf)
        if not (finite := leaf.flatten(1).isfinite().all(1)).all():
            raise UserError(f"noise row {int(finite.logical_not().nonzero()[0])} holds NaN or Inf")
    counts = {len(leaf) for leaf in named.values()}
    if len(counts) > 1:
        raise UserError(f"the leaves of noise must have equally many rows, not {described(noise)}")
    return counts.pop()


def _check_draws(draws: object, noise: Tree, count: int) -> None:
    entries = draws if isinstance(draws, Tensor | Sequence) and not isinstance(draws, str) else ()
    if [shapes_of(entry) for entry in entries] != [shapes_of(noise)] * count:
        raise UserError(f"draws must be {count} tensors {shapes_of(noise)}, like the noise, one for each noisy step")


def _conditions(model: object, y: Tensor | Mapping[str, Tensor | float], count: int) -> Tree:
    """y with a tensor [N] for each number. Raises UserError for what is no label of this model, and for shapes."""
    given = y if isinstance(y, Mapping) else {"label": y}
    labels: Any = given.get("label")
    check_labels(model, labels, count, wait=True)
    told: dict[str, Tensor] = {}
    for name, value in given.items():
        if not isinstance(value, Tensor) and is_number(value) and math.isfinite(value):
            value = torch.full((count,), value, dtype=torch.float64)
        if not isinstance(value, Tensor) or value.shape != (count,) or value.is_floating_point() == (name == "label"):
            raise UserError(f"y['{name}'] must be a finite number or floats [{count}], not {described(value)}")
        told[name] = value.to(labels.device)
    if {"t_min", "t_max"} <= told.keys():
        check_order(("t_min", told["t_min"]), ("t_max", told["t_max"]))
    return told if isinstance(y, Mapping) else told["label"]


def _from_generator(generator: torch.Generator | None, state: Tree, dtype: torch.dtype) -> Draw:
    origin = None if generator is None else generator.device

    def normal(leaf: Tensor) -> Tensor:
        return torch.randn(leaf.shape, generator=generator, device=origin, dtype=dtype).to(leaf)

    return lambda step: each(normal, state)


def _given(draws: Sequence[Tree] | Tensor, state: Tree) -> Draw:
    return lambda step: each(lambda drawn, leaf: drawn.to(leaf), draws[step], state)


def _philox(seed: int, index: Tensor, state: Tree) -> Draw:
    key, shapes = Key(seed, index), {name: leaf.shape[1:] for name, leaf in leaves(state).items()}
    return lambda step: each(Tensor.double, like(state, key.leaves(Stream.SAMPLER + step, shapes)))


def _copy(source: Tree, rows: list[int], target: Tree, places: list[int]) -> None:
    for name, leaf in leaves(source).items():
        leaves(target)[name][places] = leaf[rows]


def _chunks(index: Tensor, count: int, chunk: int) -> dict[int, tuple[list[int], list[int]]]:
    """First index of each chunk -> (rows of the caller's batch, their rows in the chunk), ascending."""
    if not isinstance(index, Tensor) or index.shape != (count,) or index.dtype != torch.int64 or index.is_meta:
        raise UserError(f"index must be int64 [{count}], not {described(index)}")
    numbers = index.tolist()
    if len(set(numbers)) != count or (count and not 0 <= min(numbers) <= max(numbers) < 1 << 62):
        raise UserError("index must hold different numbers >= 0 and < 2^62")
    slots: dict[int, tuple[list[int], list[int]]] = {}
    for row, number in sorted(enumerate(numbers), key=lambda item: item[1]):
        rows, places = slots.setdefault(number - number % chunk, ([], []))
        rows.append(row)
        places.append(number % chunk)
    return slots


@contextmanager
def _evaluating(model: object) -> Iterator[None]:
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
