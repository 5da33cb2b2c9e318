"""From the bytes of a sample's members to the tensors of a micro-batch; shared by both readers."""

import io
import struct
import zlib

import numpy as np
import torch

from dit_fast.data.dataset import LatentDataset
from dit_fast.data.shards import FIELD_MEMBERS, MOMENTS_MEMBER, key_of, parse_npy
from dit_fast.errors import DataError


class BatchBuilder:
    """Collects samples into preallocated arrays. fields: extra ones, of "image" and "features"."""

    def __init__(self, dataset: LatentDataset, fields: tuple[str, ...], check_crc: bool = True):
        dataset.require(fields)
        self.dataset, self.check_crc = dataset, check_crc
        self._arrays = dataset.info.arrays
        self.names = ("moments", *fields)
        self.members = tuple(FIELD_MEMBERS[name] for name in self.names)

    def place(self, shard: int, row: int, column: str) -> tuple[int, int, int]:
        """(offset, length, crc32) of a member of a sample, from the shard's index."""
        index = self.dataset.indexes[shard]
        position = index.members.index(column)
        return int(index.offset[row, position]), int(index.length[row, position]), int(index.crc[row, position])

    def describe(self, shard: int, row: int, member: str) -> str:
        """`ROOT/shard-000003.tar: 000001234.moments.npy`, for messages."""
        key = self.dataset.indexes[shard].first_key + row
        return f"{self.dataset.shard_path(shard)}: {key_of(key)}.{member}"

    def check(self, data: bytes, shard: int, row: int, member: str) -> None:
        """Raises DataError when the bytes are not those the index was made from."""
        _, length, crc = self.place(shard, row, member)
        name = self.describe(shard, row, member)
        if len(data) != length:
            raise DataError(f"{name} has {len(data)} bytes where the index says {length}; restore or rebuild the shard")
        if self.check_crc and zlib.crc32(data) != crc:
            raise DataError(f"{name} is corrupt (crc32 differs from the index); restore or rebuild the shard")

    def allocate(self, positions: np.ndarray, places: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """A micro-batch without its payload. positions: int64 [n]; places: (shard, row) of each sample."""
        n, info = len(places), self.dataset.info
        batch: dict[str, torch.Tensor] = {
            "moments": torch.empty((n, 2, info.channels, info.size, info.size), dtype=torch.float32),
            "label": torch.from_numpy(
                np.array([self.dataset.indexes[shard].label[row] for shard, row in places], np.int64)
            ),
            "position": torch.from_numpy(np.array(positions, np.int64)),
        }
        if "image" in self.names:
            batch["image"] = torch.empty((n, 3, info.image_size or 0, info.image_size or 0), dtype=torch.uint8)
        if "features" in self.names:
            batch["features"] = torch.empty((n, *(info.feature_shape or (0, 0))), dtype=torch.float32)
        return batch

    def put(self, target: torch.Tensor, data: bytes, shard: int, row: int, member: str) -> None:
        """One sample's member into its place in the batch. Raises DataError naming it if it does not fit."""
        where, out = self.describe(shard, row, member), target.numpy()
        if member == FIELD_MEMBERS["image"]:
            out[...] = decode_png(data, out.shape, where)
        else:
            out[...] = parse_npy(data, *self._arrays[member], where)
            check_values(out, member == MOMENTS_MEMBER, where)

    def build(
        self, positions: np.ndarray, samples: list[tuple[int, int, tuple[bytes, ...]]]
    ) -> dict[str, torch.Tensor]:
        """The micro-batch of the contract. positions: int64 [n]; samples: (shard, row, bytes per member) in that
        order.
        """
        batch = self.allocate(positions, [(shard, row) for shard, row, _ in samples])
        for i, (shard, row, payload) in enumerate(samples):
            for name, member, data in zip(self.names, self.members, payload, strict=True):
                self.put(batch[name][i], data, shard, row, member)
        return batch


def check_values(array: np.ndarray, moments: bool, where: str) -> None:
    """For float32. Raises DataError naming `where` for NaN and Inf and, in moments [2, C, h, w], for a negative std."""
    if not np.isfinite(array).all():
        raise DataError(f"{where} holds NaN or Inf; encode this image again and rebuild the shard")
    if moments and array[1].min() < 0:
        raise DataError(f"{where} holds a negative standard deviation (a log variance?); rebuild the shard")


def decode_png(data: bytes, shape: tuple[int, ...], where: str) -> np.ndarray:
    """uint8 `shape` = [3, S, S] of a PNG of 8-bit RGB and that size. Raises DataError naming `where`.

    The header is compared first: Pillow would clip deeper images without a word, and believe any size.
    """
    from PIL import Image

    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBB", 13, b"IHDR", shape[2], shape[1], 8, 2)
    if not data.startswith(head):
        raise DataError(f"{where} is not a PNG of 8-bit RGB and {shape[2]}x{shape[1]} pixels; rebuild the shard")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise DataError(f"{where} is not a readable PNG ({type(error).__name__}); rebuild the shard") from None
