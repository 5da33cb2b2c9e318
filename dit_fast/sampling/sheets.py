"""Pictures of how a run draws: between two seeds, and on the way from noise to an image. One row for each class."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_fast.diffusion import SOLVERS, Guidance
from dit_fast.diffusion.conversions import convert
from dit_fast.diffusion.solvers import Field
from dit_fast.errors import UserError
from dit_fast.sampling.grids import class_grid
from dit_fast.sampling.images import Drawing
from dit_fast.tree import Tree, each, image

if TYPE_CHECKING:
    from PIL import Image

MOST_TIMES = 1000


def interpolation(drawing: Drawing, seeds: Sequence[int], class_names: Sequence[str]) -> "Image.Image":
    """Row r: per_class images of its class whose noise goes from that of image r of the one seed to that of the other.

    Raises UserError for equal seeds, fewer than two images, and a sampler that adds noise.
    """
    options, (first, last) = drawing.options, seeds
    _check_rows(drawing)
    if first == last:
        raise UserError(f"interpolation from seed {first} to itself shows one image; name two seeds")
    if (columns := options.per_class or 0) < 2:
        raise UserError(f"per_class={columns}: an interpolation has two ends; give 2 or more")
    if SOLVERS[_sampler(drawing)].noisy:
        raise UserError(f"sampler '{options.sampler}' adds noise of its own to each image; interpolate with heun")
    index = torch.arange(len(options.classes) * columns, dtype=torch.int64, device=drawing.device)
    rows, shares = index // columns, (index % columns).double() / (columns - 1)
    noise = each(lambda a, b: slerp(a, b, shares), *(drawing.noise(rows, seed) for seed in seeds))
    labels = torch.tensor(options.classes, dtype=torch.int64, device=drawing.device)[rows]
    pictures = drawing.pictures(drawing.latents(noise, labels, index))
    caption = f"{replace(options, seed=first).text()} to seed {last}"
    return class_grid({caption: (pictures, labels.cpu().numpy())}, options.classes, class_names)


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """From a (share 0) to b (share 1), each [N, ...], along the great circle; share [N].

    Normal numbers lie near a sphere, on whose chord they would be too small.
    """
    angle = torch.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-1, 1).acos()
    shape = (-1, *[1] * (a.dim() - 1))
    weights = [(part * angle).sin() / angle.sin() for part in (1 - share, share)]
    return weights[0].reshape(shape) * a + weights[1].reshape(shape) * b


def strips(drawing: Drawing, times: int, class_names: Sequence[str]) -> "Image.Image":
    """Row r: what image r is predicted to become, seen from `times` of the sampler's times, and the image itself.

    The prediction of x at time t is that of the guided velocity. Raises UserError for a sampler that follows no
    velocity, or chooses its own steps, and where it has fewer times.
    """
    options = drawing.options
    _check_rows(drawing)
    solver = SOLVERS[_sampler(drawing)]
    if solver.follows != "velocity" or solver.adaptive:
        raise UserError(f"sampler '{solver.name}' predicts nothing at fixed times; draw strips with euler, heun or sde")
    seen: list[dict[float, Tensor]] = []  # of each chunk, by time

    def watched(model: Any, y: Tree, guidance: Guidance) -> Field:
        velocity = drawing.objective.field(model, y, guidance)
        at: dict[float, Tensor] = {}
        seen.append(at)

        def v(x: Tree, t: float, s: float) -> Tree:
            found = velocity(x, t, s)
            if s < t and t not in at:  # a step's first evaluation
                at[t] = convert(image(found), image(x), t, drawing.objective.path, target="x").float()
            return found

        return v

    index = torch.arange(len(options.classes), dtype=torch.int64, device=drawing.device)
    labels = torch.tensor(options.classes, dtype=torch.int64, device=drawing.device)
    latents = drawing.latents(drawing.noise(index), labels, index, watched)
    predicted = {t: torch.cat([at[t] for at in seen])[: len(index)] for t in sorted(seen[0], reverse=True)}
    if not 1 <= times <= len(predicted):
        raise UserError(f"strips={times}: this sampling has 1 to {len(predicted)} times; change it or --num-steps")
    chosen = [list(predicted)[math.floor(k * len(predicted) / times)] for k in range(times)]
    states: Mapping[str, Tensor] = {**{f"t = {t:.3g}": predicted[t] for t in chosen}, "drawn": latents}
    columns = {title: (drawing.pictures(state), labels.cpu().numpy()) for title, state in states.items()}
    return class_grid(columns, options.classes, class_names, options.text())


def _sampler(drawing: Drawing) -> str:
    assert drawing.options.sampler, "resolve the options first"
    return drawing.options.sampler


def _check_rows(drawing: Drawing) -> None:
    if drawing.options.count is not None:
        raise UserError("such a picture has a row for each class; say which with classes, and drop count")
