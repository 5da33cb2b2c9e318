"""Random numbers of a batch: several draws of the counter-based generator in one launch, the same bits everywhere.

dit_fast/philox.py defines the numbers; where Triton runs, one kernel gives all that are asked for together. A step asks
for them here and there, one after the other. A `Key` that is told what is going to be asked for makes all of it with
the first.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dit_fast import backend as backends
from dit_fast import philox
from dit_fast.ops._op import triton
from dit_fast.ops._register import define

OP = "draws"
Draw = tuple[bool, int, tuple[int, ...]]  # whether it is normal, or uniform; stream; shape of one position's


def _refuses(positions: Tensor, counts: Sequence[int]) -> Sequence[str]:
    from dit_fast.kernels import philox as kernel

    return kernel.supports(positions, counts)


backends.register(OP, triton(_refuses))


def draws(seed: int, positions: Tensor, wanted: Sequence[Draw], backend: str = "auto") -> list[Tensor]:
    """`philox.normal` or `philox.uniform`, float32 [N, *shape], of each; for positions int64 [N], on their device.

    Raises UserError for a seed, a stream or a shape out of range and for other positions, ConfigError for a backend
    that is unknown or cannot run.
    """
    counts = [math.prod(shape) for _, _, shape in wanted]
    for (_, stream, _), count in zip(wanted, counts, strict=True):
        philox.check(seed, positions, stream, count)
    chosen = backends.choose(OP, backend, positions.device.type, positions, counts)
    if chosen == "torch":
        return [_alone(seed, positions, *each) for each in wanted]
    signed = seed - (1 << 64) if seed >> 63 else seed  # a torch op takes signed integers
    normals, streams = [normal for normal, _, _ in wanted], [stream for _, stream, _ in wanted]
    numbers = draws_op(positions, signed, normals, streams, counts, chosen)
    found, place = [], 0
    for (_, _, shape), count in zip(wanted, counts, strict=True):
        size = len(positions) * count
        found.append(numbers[place : place + size].view(-1, *shape))
        place += _padded(size)
    return found


def _alone(seed: int, positions: Tensor, normal: bool, stream: int, shape: tuple[int, ...]) -> Tensor:
    return (philox.normal if normal else philox.uniform)(seed, positions, stream, shape)


def _padded(size: int) -> int:
    """Draws follow each other at multiples of 16 bytes."""
    return -(-size // 4) * 4


def _run(
    positions: Tensor, seed: int, normals: list[bool], streams: list[int], counts: list[int], backend: str
) -> Tensor:
    seed = seed + (1 << 64) if seed < 0 else seed
    if backend == "triton":
        from dit_fast.kernels import philox as kernel

        return kernel.draws(positions, seed, normals, streams, counts)
    shapes = [(count,) for count in counts]
    found = [_alone(seed, positions, *each).flatten() for each in zip(normals, streams, shapes, strict=True)]
    return torch.cat([torch.nn.functional.pad(each, (0, _padded(len(each)) - len(each))) for each in found])


def _fake(
    positions: Tensor, seed: int, normals: list[bool], streams: list[int], counts: list[int], backend: str
) -> Tensor:
    return positions.new_empty(sum(_padded(len(positions) * count) for count in counts), dtype=torch.float32)


_SCHEMA = "draws(Tensor positions, int seed, bool[] normals, int[] streams, int[] counts, str backend) -> Tensor"
draws_op = define(_SCHEMA, _run, _fake)


class Key:
    """What all random numbers of a batch depend on: the noise seed and each sample's position in the run, int64 [N].

    ahead: draws that are made in one launch with the first one. That changes no number; `asked`, what was drawn so far,
    is what to tell the next key.
    """

    def __init__(self, seed: int, position: Tensor, ahead: Iterable[Draw] = ()):
        self.seed, self.position = seed, position
        self.asked: list[Draw] = []
        self._ahead = tuple(ahead)
        self._ready: dict[Draw, Tensor] = {}

    def normal(self, stream: int, shape: Sequence[int]) -> Tensor:
        """Standard normal float32 [N, *shape] of a use of its own; on the positions' device."""
        return self._draw((True, int(stream), tuple(shape)))

    def uniform(self, stream: int, shape: Sequence[int]) -> Tensor:
        """Uniform float32 [N, *shape] in [0, 1), otherwise as `normal`."""
        return self._draw((False, int(stream), tuple(shape)))

    def leaves(self, stream: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """`normal` for the leaves of what is denoised; `stream` is the image's (`philox.leaf_stream`)."""
        return {name: self.normal(philox.leaf_stream(name, stream), shape) for name, shape in shapes.items()}

    def _draw(self, wanted: Draw) -> Tensor:
        self.asked.append(wanted)
        if wanted not in self._ready:
            together = list(dict.fromkeys((wanted, *self._ahead)))
            self._ahead = ()
            self._ready.update(zip(together, draws(self.seed, self.position, together), strict=True))
        return self._ready.pop(wanted)  # a second use gets a tensor of its own
