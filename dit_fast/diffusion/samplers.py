"""Samplers from noise (t = 1) to data (t = 0): Euler, Heun, and the Euler-Maruyama SDE on the published grid.

Formulas: SiT (arXiv 2401.08740), Sec. 3.3, with the grids of REPA's sampler. The state is float64.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor, nn

from dit_fast import philox
from dit_fast.diffusion.guidance import Channels, Guidance, Velocity, described
from dit_fast.diffusion.paths import Path, as_path
from dit_fast.errors import UserError

LAST_STOCHASTIC_TIME = 0.04
MOST_STEPS = philox.Stream.METHOD - philox.Stream.SAMPLER  # every step draws from a Philox stream of its own
MOST_ROWS = 1 << 16  # of one batch

Progress = Callable[[int, int], None]
Draw = Callable[[int], Tensor]


def initial_noise(seed: int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Starting noise of the images `index` (int64 [N]): float64 [N, *shape]; row k is a function of (seed, k) alone."""
    return philox.normal(seed, index, philox.Stream.INITIAL_NOISE, shape).double()


def sample(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    noise: Tensor,
    y: Tensor,
    sampler: str = "euler",
    num_steps: int = 50,
    cfg_scale: float = 1.0,
    guidance_low: float = 0.0,
    guidance_high: float = 1.0,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    index: Tensor | None = None,
    path: Path | str = "linear",
    chunk: int = 64,
    callback: Progress | None = None,
    cfg_channels: Channels | None = None,
    draws: Sequence[Tensor] | Tensor | None = None,
) -> Tensor:
    """Latents float64 [N, C, H, W] from `noise` [N, C, H, W] (any float dtype) and labels y int64 [N].

    sampler: "euler", "heun" (second order, Euler on the last step; its second evaluation keeps the guidance decision of
    the first) or "sde" (num_steps - 1 noisy steps on linspace(1, 0.04), then one without noise to 0). `path` is the
    path the model was trained on; only the SDE needs it. A model in training mode is evaluated in eval mode and put
    back.

    Guidance: v = v_null + cfg_scale (v_label - v_null) while guidance_low <= t <= guidance_high, for every finite
    cfg_scale; 1 is the label alone (one model row per sample), 0 the null label. cfg_channels: "all", or "first_three"
    as the released samplers of DiT and SiT; by default what `model.cfg_channels` says ("all" where it says nothing).

    Randomness of the SDE: `generator` (per noisy step one float64 standard normal of the state's shape, in order), or
    `draws` (those num_steps - 1 tensors themselves), or `seed` and `index` int64 [N] (Philox per seed, index and step).

    With seed and index the work is cut into the fixed chunks [c * chunk, (c + 1) * chunk) of the index space; index k
    is always row k % chunk of a batch of `chunk` rows, and rows that fill it up are computed on zeros. Image k is then
    the same bytes however the indices are spread over calls and ranks; hand out whole chunks, so that no row is wasted.
    Otherwise all N rows are one batch.

    callback(done, total) is called after every sampling step. Raises UserError for an unknown sampler or path, a number
    out of range, guidance of a model without a null label, labels that the model does not have (where it says
    num_classes; its null label is one it has), noise that is not finite, shapes that do not fit, several or no sources
    of randomness where one is needed, and repeated indices.
    """
    check_options(sampler, num_steps, chunk, seed)
    if not isinstance(noise, Tensor) or not noise.is_floating_point() or noise.dim() < 2:
        raise UserError(f"noise must be a floating point tensor [N, C, ...], not {described(noise)}")
    if sum(source is not None for source in (generator, draws, index if seed is None else seed)) > 1:
        raise UserError("give one source of noise: generator=, or draws=, or seed= and index=; not both")
    if (seed is None) != (index is None):
        raise UserError("seed= and index= belong together; one of them is missing")
    if sampler == "sde" and generator is None and seed is None and draws is None:
        raise UserError("sampler 'sde' draws noise; give generator=, or draws=, or seed= and index=")
    if not isinstance(generator, torch.Generator | None):
        raise UserError(f"generator must be a torch.Generator, not {described(generator)}")
    if sampler == "sde" and draws is not None:
        _check_draws(draws, noise, num_steps - 1)
    channels: Channels = getattr(model, "cfg_channels", "all") if cfg_channels is None else cfg_channels
    guidance = Guidance(cfg_scale, guidance_low, guidance_high, channels)
    for name, tensor in {"noise": noise, "y": y}.items():
        if isinstance(tensor, Tensor) and (tensor.is_meta or tensor.layout != torch.strided):
            raise UserError(f"{name} must be a dense tensor with values, not {tensor.layout} on {tensor.device}")
    _check_labels(model, y, len(noise))
    if not (finite := noise.flatten(1).isfinite().all(1)).all():
        raise UserError(f"noise row {int(finite.logical_not().nonzero()[0])} holds NaN or Inf")
    velocity = Velocity(model, guidance)
    solver, path, state = SAMPLERS[sampler], as_path(path), noise.double()
    with torch.no_grad(), _evaluating(model):
        if seed is None or index is None:
            report = _progress(callback, num_steps)
            draw = _from_generator(generator, state) if draws is None else _given(draws, state)
            return solver(velocity, state, y, num_steps, path, draw, report)
        slots = _chunks(index, len(noise), chunk)
        report, result = _progress(callback, num_steps * len(slots)), torch.empty_like(state)
        for first, (rows, places) in slots.items():
            x, labels = state.new_zeros(chunk, *state.shape[1:]), y.new_zeros(chunk)
            x[places], labels[places] = state[rows], y[rows]
            draw = _keyed(
                seed, torch.arange(first, first + chunk, dtype=torch.int64, device=state.device), state.shape[1:]
            )
            result[rows] = solver(velocity, x, labels, num_steps, path, draw, report)[places]
        return result


def check_options(sampler: str, num_steps: int, chunk: int = 1, seed: int | None = None) -> None:
    """Raises UserError naming the option, for an unknown sampler or a number out of range."""
    if sampler not in SAMPLERS:
        raise UserError(f"unknown sampler '{sampler}'; valid: {', '.join(SAMPLERS)}")
    check_whole("num_steps", num_steps, 1, MOST_STEPS)
    check_whole("chunk", chunk, 1, MOST_ROWS)
    if seed is not None:
        check_whole("seed", seed, 0, 2**64 - 1)


def check_whole(name: str, value: object, least: int, most: int) -> None:
    """Raises UserError unless the value is a whole number in [least, most]."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) <= most:
        raise UserError(f"{name}={value!r} must be a whole number from {least} to {most}")


def _check_draws(draws: object, noise: Tensor, count: int) -> None:
    entries = draws if isinstance(draws, Tensor | Sequence) and not isinstance(draws, str) else ()
    if [each.shape if isinstance(each, Tensor) else None for each in entries] != [noise.shape] * count:
        raise UserError(f"draws must be num_steps - 1 = {count} tensors {list(noise.shape)}, like the noise")


def _check_labels(model: object, y: Tensor, count: int) -> None:
    if not isinstance(y, Tensor) or y.shape != (count,) or y.dtype not in (torch.int64, torch.int32):
        raise UserError(f"labels y must be int64 [{count}], one for each row of noise, not {described(y)}")
    classes = getattr(model, "num_classes", None)
    if not isinstance(classes, int):
        return
    bad = ((y < 0) | (y > max(classes - 1, getattr(model, "null_label", -1)))).nonzero()
    if len(bad):
        row = int(bad[0])
        raise UserError(f"y[{row}] = {int(y[row])} is no label of this model; its labels are 0..{classes - 1}")


def _euler(v: Velocity, x: Tensor, y: Tensor, num_steps: int, path: Path, draw: Draw, report: Callable) -> Tensor:
    for t, following in _steps(_grid(1.0, 0.0, num_steps + 1)):
        x = x + (following - t) * v(x, t, y, v.guidance.active(t))
        report()
    return x


def _heun(v: Velocity, x: Tensor, y: Tensor, num_steps: int, path: Path, draw: Draw, report: Callable) -> Tensor:
    steps = _steps(_grid(1.0, 0.0, num_steps + 1))
    for i, (t, following) in enumerate(steps):
        guided = v.guidance.active(t)
        slope = v(x, t, y, guided)
        ahead = x + (following - t) * slope
        if i < len(steps) - 1:
            slope = (slope + v(ahead, following, y, guided)) / 2
            ahead = x + (following - t) * slope
        x = ahead
        report()
    return x


def _sde(v: Velocity, x: Tensor, y: Tensor, num_steps: int, path: Path, draw: Draw, report: Callable) -> Tensor:
    steps = _steps([*_grid(1.0, LAST_STOCHASTIC_TIME, num_steps), 0.0])
    for i, (t, following) in enumerate(steps):
        velocity, diffusion = v(x, t, y, v.guidance.active(t)), 2 * t
        step = following - t
        moved = x + step * (velocity - diffusion / 2 * _score(path, velocity, x, t))
        x = moved + (diffusion * -step) ** 0.5 * draw(i) if i < len(steps) - 1 else moved
        report()
    return x


SAMPLERS: dict[str, Callable[[Velocity, Tensor, Tensor, int, Path, Draw, Callable], Tensor]] = {
    "euler": _euler,
    "heun": _heun,
    "sde": _sde,
}


def _score(path: Path, velocity: Tensor, x: Tensor, t: float) -> Tensor:
    """grad log p_t(x) from the velocity (SiT, Eq. 9)."""
    alpha, sigma, d_alpha, d_sigma = path.coefficients(t)
    ratio = alpha / d_alpha
    return (ratio * velocity - x) / (sigma**2 - ratio * d_sigma * sigma)


def _grid(start: float, stop: float, count: int) -> list[float]:
    return torch.linspace(start, stop, count, dtype=torch.float64).tolist()


def _steps(times: list[float]) -> list[tuple[float, float]]:
    return list(pairwise(times))


def _from_generator(generator: torch.Generator | None, state: Tensor) -> Draw:
    def draw(step: int) -> Tensor:
        origin = None if generator is None else generator.device
        noise = torch.randn(state.shape, generator=generator, device=origin, dtype=torch.float64)
        return noise.to(state.device)

    return draw


def _given(draws: Sequence[Tensor] | Tensor, state: Tensor) -> Draw:
    return lambda step: draws[step].to(state)


def _keyed(seed: int, index: Tensor, shape: tuple[int, ...]) -> Draw:
    return lambda step: philox.normal(seed, index, philox.Stream.SAMPLER + step, tuple(shape)).double()


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


def _progress(callback: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def report() -> None:
        nonlocal done
        done += 1
        if callback is not None:
            callback(done, total)

    return report


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
