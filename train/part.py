"""A rank's part of a checkpoint: which pieces it saves, their copy in host memory, and the files it writes."""

import contextlib
import errno
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from dit_fast import files
from dit_fast.checkpoint.manifest import file_name
from dit_fast.checkpoint.step import DTYPES, KINDS, PIECES, key_of
from dit_fast.train.engine import Engine
from dit_fast.world import World

TRAINED = ("model", "ema", "exp_avg", "exp_avg_sq")  # of the trained parameters
LINE = 64  # bytes: where a piece may begin in host memory
Entry = tuple[str, torch.dtype, torch.Size]
Untrained = Mapping[str, Mapping[str, Tensor]]


class Share(NamedTuple):
    """What one rank saves of a tensor. values: flat. shape: of the whole.

    held: flat, all that this rank has of it. Where ranks have copies, all are looked at before the pieces are saved.
    """

    kind: str
    name: str
    first: int
    values: Tensor
    shape: torch.Size
    held: Tensor

    @property
    def whole(self) -> bool:
        return len(self.values) == self.shape.numel()

    @property
    def is_all_held(self) -> bool:
        return len(self.values) == len(self.held)


def shares(engine: Engine, untrained: Untrained, world: World) -> Iterator[Share]:
    """This rank's shares of all that is saved, live: the same kinds and names on every rank, some without a value.

    The engine says who saves what of the trained parameters; the rest lies whole on every rank and is dealt out evenly.
    """
    shapes = dict(engine.trainable())
    for kind in TRAINED:
        for name, first, values, held in engine.own_state(kind):
            yield Share(kind, name, first, values, shapes[name], held)
    rest = [(kind, name, tensor) for kind, tensors in untrained.items() for name, tensor in tensors.items()]
    dealt = world.shares([tensor.numel() for *_, tensor in rest])
    for (kind, name, tensor), (first, end) in zip(rest, dealt, strict=True):
        held = tensor.detach().reshape(-1)
        yield Share(kind, name, first, held[first:end], tensor.shape, held)


class HostMemory:
    """Where shares wait to be written: one block, used again by the next save; page-locked for a CUDA device."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._block = torch.empty(0, dtype=torch.uint8)
        self._arrived: torch.cuda.Event | None = None

    def reserve(self, held: Iterable[Share]) -> None:
        """Raises OSError where there is not so much memory."""
        size = sum(_room(share.values) for share in held)
        if len(self._block) < size:
            self._block = torch.empty(0, dtype=torch.uint8)
            try:
                self._block = torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda)
            except RuntimeError:  # of CUDA's allocator and of the CPU's
                text = f"no {size >> 20} MiB of host memory for its copy; set run.async_checkpoint=false"
                raise OSError(errno.ENOMEM, text) from None

    def copy(self, held: Iterable[Share]) -> list[Share]:
        """The shares as they are now, whatever is queued on the device after this call; to be read after `wait`."""
        copies, offset = [], 0
        for share in held:
            target = self._block[offset : offset + share.values.nbytes].view(share.values.dtype)
            target.copy_(share.values, non_blocking=True)
            copies.append(share._replace(values=target, held=target))
            offset += _room(share.values)
        if self._cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        return copies

    def wait(self) -> None:
        if self._arrived is not None:
            self._arrived.synchronize()


def _room(values: Tensor) -> int:
    return -(-values.nbytes // LINE) * LINE


class TensorFile:
    """A safetensors file written tensor by tensor, in the announced order, hashed on the way."""

    def __init__(self, path: Path, entries: Iterable[Entry], metadata: Mapping[str, str] | None = None):
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        offset = 0
        for name, dtype, shape in entries:
            end = offset + shape.numel() * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        self._hash, self._size = hashlib.sha256(), 0
        self._file: BinaryIO = path.open("wb")
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._put(len(text).to_bytes(8, "little") + text)

    def add(self, tensor: Tensor) -> None:
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._put(content.numpy().data)

    def finish(self) -> dict[str, Any]:
        """Flushes to the disk and closes; returns its entry in a manifest."""
        files.sync(self._file)
        self._file.close()
        return {"bytes": self._size, "sha256": self._hash.hexdigest()}

    def abandon(self) -> None:
        """Closes a file that is not wanted; nothing after `finish`."""
        with contextlib.suppress(OSError):  # a full disk may refuse the last buffer too; the file is removed anyway
            self._file.close()

    def _put(self, data: bytes | memoryview) -> None:
        files.write(self._file, data)
        self._hash.update(data)
        self._size += len(data)


def write_part(folder: Path, held: Iterable[Share], world: World) -> dict[str, dict[str, Any]]:
    """Writes this rank's files; name -> entry in the manifest. Raises OSError."""
    groups: dict[str, list[Share]] = {}
    for share in held:  # a group that any rank has, all have
        own = groups.setdefault(KINDS[share.kind], [])
        if len(share.values) or not (share.shape.numel() or world.rank):
            own.append(share)
    listed = {}
    for group, own in groups.items():
        entries: list[Entry] = []
        pieces: dict[str, tuple[int, list[int]]] = {}
        for share in own:
            key = key_of(share.kind, share.name)
            if not share.whole:
                pieces[key] = share.first, list(share.shape)
            entries.append((key, share.values.dtype, share.shape if share.whole else share.values.shape))
        name = file_name(group, world.rank, world.size)
        file = TensorFile(folder / name, entries, {PIECES: json.dumps(pieces)} if pieces else None)
        try:
            for share in own:
                file.add(share.values)
            listed[name] = file.finish()
        finally:
            file.abandon()
    return listed
