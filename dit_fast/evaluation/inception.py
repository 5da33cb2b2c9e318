"""The Inception network of 2015 whose features FID is of, as TensorFlow's frozen graph computes it.

It differs from torchvision's: averages leave padding out, the last block takes a maximum, there are 1,008 classes.
Weights are a state_dict under the names of torch-fidelity's file (`weights-inception-2015-12-05-6726825d.pth`), e.g.
`Mixed_6d.branch7x7_2.conv.weight`: as that file itself, as `.safetensors`, or the graph `classify_image_graph_def.pb`,
which is read without TensorFlow (`dit_fast.evaluation.graph`). `save_file` of `load_inception(PB).state_dict()` is the
converted form.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_fast.errors import CheckpointError
from dit_fast.evaluation.graph import Constants, read_graph
from dit_fast.published import read_state

SIDE = 299  # pixels of the input
CLASSES = 1008
SPATIAL = 7  # channels of mixed_6/conv that sFID is of
EPS = 1e-3  # of batch norm
Size = int | tuple[int, int]


class Conv(NamedTuple):
    """A convolution with batch norm and ReLU; without padding where the stride is 2, else as large as its input."""

    name: str
    width: int
    size: Size = 1
    stride: int = 1


class Split(NamedTuple):
    """Two convolutions of the same input, side by side."""

    parts: tuple[Conv, Conv]


class Pool(NamedTuple):
    """3 x 3; kind: "average" or "max"; halving has stride 2 and no padding."""

    kind: str
    stride: int = 1


Branch = tuple[Conv | Split | Pool, ...]


def _a(pooled: int) -> tuple[Branch, ...]:
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, 5)),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3)),
        (Pool("average"), Conv("branch_pool", pooled)),
    )


def _c(inner: int) -> tuple[Branch, ...]:
    wide, tall = (1, 7), (7, 1)
    name = "branch7x7dbl_"
    return (
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", inner), Conv("branch7x7_2", inner, wide), Conv("branch7x7_3", 192, tall)),
        (
            Conv(f"{name}1", inner), Conv(f"{name}2", inner, tall), Conv(f"{name}3", inner, wide),
            Conv(f"{name}4", inner, tall), Conv(f"{name}5", 192, wide),
        ),
        (Pool("average"), Conv("branch_pool", 192)),
    )  # fmt: skip


def _e(pool: str) -> tuple[Branch, ...]:
    wide, tall = (1, 3), (3, 1)
    split = [
        Split((Conv(f"{name}a", 384, wide), Conv(f"{name}b", 384, tall))) for name in ("branch3x3_2", "branch3x3dbl_3")
    ]
    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), split[0]),
        (Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, 3), split[1]),
        (Pool(pool), Conv("branch_pool", 192)),
    )


STEM: tuple[Conv | Pool, ...] = (
    Conv("Conv2d_1a_3x3", 32, 3, 2), Conv("Conv2d_2a_3x3", 32, 3), Conv("Conv2d_2b_3x3", 64, 3), Pool("max", 2),
    Conv("Conv2d_3b_1x1", 80), Conv("Conv2d_4a_3x3", 192, 3), Pool("max", 2),
)  # fmt: skip
UNPADDED = ("Conv2d_2a_3x3", "Conv2d_4a_3x3")
BLOCKS: dict[str, tuple[Branch, ...]] = {  # in the graph's order: mixed, mixed_1, ..., mixed_10
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": (
        (Conv("branch3x3", 384, 3, 2),),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3, 2)),
        (Pool("max", 2),),
    ),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": (
        (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, 3, 2)),
        (
            Conv("branch7x7x3_1", 192), Conv("branch7x7x3_2", 192, (1, 7)), Conv("branch7x7x3_3", 192, (7, 1)),
            Conv("branch7x7x3_4", 192, 3, 2),
        ),
        (Pool("max", 2),),
    ),
    "Mixed_7b": _e("average"),
    "Mixed_7c": _e("max"),
}  # fmt: skip


class _Convolution(nn.Module):
    def __init__(self, channels: int, spec: Conv):
        super().__init__()
        size = (spec.size, spec.size) if isinstance(spec.size, int) else spec.size
        padding = (0, 0) if spec.stride == 2 or spec.name in UNPADDED else (size[0] // 2, size[1] // 2)
        self.conv = nn.Conv2d(channels, spec.width, size, spec.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(spec.width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Block(nn.Module):
    def __init__(self, channels: int, branches: tuple[Branch, ...]):
        super().__init__()
        self._branches, self.width = branches, 0
        for branch in branches:
            width = channels
            for step in branch:
                if isinstance(step, Conv):
                    self.add_module(step.name, _Convolution(width, step))
                    width = step.width
                elif isinstance(step, Split):
                    for part in step.parts:
                        self.add_module(part.name, _Convolution(width, part))
                    width = sum(part.width for part in step.parts)
            self.width += width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._along(branch, x) for branch in self._branches], 1)

    def _along(self, branch: Branch, x: Tensor) -> Tensor:
        for step in branch:
            if isinstance(step, Split):
                x = torch.cat([self.get_submodule(part.name)(x) for part in step.parts], 1)
            else:
                x = self.get_submodule(step.name)(x) if isinstance(step, Conv) else _pool(x, step)
        return x


def _pool(x: Tensor, spec: Pool) -> Tensor:
    padding = 0 if spec.stride == 2 else 1
    if spec.kind == "max":
        return F.max_pool2d(x, 3, spec.stride, padding)
    return F.avg_pool2d(x, 3, spec.stride, padding, count_include_pad=False)


class Inception(nn.Module):
    """uint8 [N, 3, H, W] -> float32 by name: pool [N, 2048] (FID, IS, precision, recall), spatial [N, 2023] (sFID: 17 x
    17 x 7 in the graph's order) and logits [N, 1008] (IS: without bias).
    """

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for step in STEM:
            if isinstance(step, Conv):
                self.add_module(step.name, _Convolution(width, step))
                width = step.width
        for name, branches in BLOCKS.items():
            block = _Block(width, branches)
            self.add_module(name, block)
            width = block.width
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = (resize_like_tensorflow(images.float(), SIDE) - 128) / 128
        for step in STEM:
            x = self.get_submodule(step.name)(x) if isinstance(step, Conv) else _pool(x, step)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
            if name == "Mixed_6d":  # mixed_6, whose first branch is mixed_6/conv
                spatial = x[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)
        pool = x.mean((2, 3))
        logits = pool.double() @ self.fc.weight.double().T
        return {"pool": pool, "spatial": spatial, "logits": logits.float()}


def resize_like_tensorflow(x: Tensor, side: int) -> Tensor:
    """float32 [N, C, H, W] -> [N, C, side, side] as ResizeBilinear of TensorFlow 1 does: pixel i of the result lies at
    i * H / side of the input, without half a pixel's shift and without antialiasing.
    """
    for dim in (3, 2):
        size = x.shape[dim]
        place = torch.arange(side, dtype=torch.float32, device=x.device) * torch.tensor(
            size / side, dtype=torch.float32
        )
        low = place.long()
        weight = (place - low).view(-1, *[1] * (3 - dim))
        before, after = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=size - 1))
        x = before + (after - before) * weight
    return x


def load_inception(path: Path) -> Inception:
    """The network with the weights of a file, on the CPU, in eval mode. Raises CheckpointError for another file."""
    with torch.device("meta"):
        network = Inception()
    wanted = {name: x for name, x in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    if path.suffix == ".pb":
        state: Mapping[str, Tensor] = dict(_of_graph(read_graph(path), path))
    else:
        found = read_state(path, "model").tensors
        state = {name: x for name, x in found.items() if not name.endswith("num_batches_tracked")}
    for name in (*wanted, *state):
        if name not in state or name not in wanted or state[name].shape != wanted[name].shape:
            what = "lacks" if name not in state else "also has" if name not in wanted else "has another shape of"
            raise CheckpointError(
                f"{path}: is not the Inception network of FID ({what} '{name}'); give torch-fidelity's file "
                "weights-inception-2015-12-05-6726825d.pth or the graph classify_image_graph_def.pb"
            )
    count = {name: torch.zeros((), dtype=torch.int64) for name in network.state_dict() if name not in wanted}
    network.load_state_dict({**{name: x.float() for name, x in state.items()}, **count}, assign=True)
    return network.eval().requires_grad_(False)


def _of_graph(constants: Constants, path: Path) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) of what the graph holds under its own names."""
    try:
        for name, scope in _scopes():
            yield f"{name}.conv.weight", constants[f"{scope}/conv2d_params"].permute(3, 2, 0, 1).contiguous()
            norm = {each: constants[f"{scope}/batchnorm/{each}"] for each in ("beta", "moving_mean", "moving_variance")}
            yield f"{name}.bn.bias", norm["beta"]
            yield f"{name}.bn.running_mean", norm["moving_mean"]
            yield f"{name}.bn.running_var", norm["moving_variance"]
            scaled = constants.scaled.get(f"{scope}/batchnorm", False)
            gamma = constants[f"{scope}/batchnorm/gamma"] if scaled else torch.ones_like(norm["beta"])
            yield f"{name}.bn.weight", gamma
        yield "fc.weight", constants["softmax/weights"].T.contiguous()
        yield "fc.bias", constants["softmax/biases"]
    except KeyError as error:
        raise CheckpointError(f"{path}: the graph holds no {error}; give classify_image_graph_def.pb of 2015") from None


def _scopes() -> Iterator[tuple[str, str]]:
    """(our name, the graph's scope) of every convolution.

    A branch of one convolution stands in its block itself; the others are tower, tower_1, ..., with those that have a
    pool and a convolution. Convolutions of a scope are conv, conv_1, ...; those side by side are in `mixed` below.
    """
    stem = [step.name for step in STEM if isinstance(step, Conv)]
    yield from ((name, _numbered("conv", number)) for number, name in enumerate(stem))
    for number, (block, branches) in enumerate(BLOCKS.items()):
        towers, scope = 0, _numbered("mixed", number)
        for branch in branches:
            inside = scope
            if len(branch) > 1:
                inside, towers = f"{scope}/{_numbered('tower', towers)}", towers + 1
            convs = [step for step in branch if isinstance(step, Conv)]
            for place, conv in enumerate(convs):
                yield f"{block}.{conv.name}", f"{inside}/{_numbered('conv', place)}"
            parts = [part for step in branch if isinstance(step, Split) for part in step.parts]
            for place, part in enumerate(parts):
                yield f"{block}.{part.name}", f"{inside}/mixed/{_numbered('conv', place)}"


def _numbered(word: str, number: int) -> str:
    return f"{word}_{number}" if number else word
