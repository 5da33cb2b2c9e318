"""Fields: what a sample holds. Each is one member of a tar, declared by name, shape and dtype."""

import io
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from dit_fast.data.shards import LABEL_MEMBER, npy_bytes, parse_npy
from dit_fast.errors import DataError

MOMENTS = "moments"
RESERVED = (MOMENTS, "label", "position", "shard")  # of every batch, and the prefix of the first tars
DTYPES = ("float16", "float32", "uint8", "int32", "int64")
NPY_HEADER_BYTES = 1 << 12  # at most


@dataclass(frozen=True)
class ShardInfo:
    """One tar: file name, number of samples, bytes, sha256 of the file."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Field:
    """One value of every sample.

    member: what follows the sample's key in the tar, `NAME.npy` (an array of this shape and dtype) or a PNG (`png`;
    shape [3, S, S], uint8, decoded when it is read). source: what it was made with, for people. shards: the tars of its
    own that it lies in, or () beside the latents; fingerprint: over the field and those tars, "" without.
    Floating-point fields come as float32, others in their dtype.
    """

    member: str
    shape: tuple[int, ...]
    dtype: str
    source: str = ""
    shards: tuple[ShardInfo, ...] = ()
    fingerprint: str = ""

    @property
    def is_png(self) -> bool:
        return not self.member.endswith(".npy")

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith("float")

    @property
    def batch_dtype(self) -> torch.dtype:
        return torch.float32 if self.is_float else getattr(torch, self.dtype)

    @property
    def limits(self) -> tuple[int, int]:
        """Fewest and most bytes of the member."""
        if self.is_png:  # one that its writer could not compress, and some more
            return 1, 4 * self.shape[-1] ** 2 + (1 << 16)
        payload = math.prod(self.shape) * np.dtype(self.dtype).itemsize
        return payload + 1, payload + NPY_HEADER_BYTES

    def encode(self, array: np.ndarray, name: str) -> bytes:
        """The member's bytes; floats are rounded to the field's. Raises DataError, "latents that ...", for what cannot
        be stored: another shape or kind, NaN, Inf or what becomes so, and negative standard deviations in moments.
        """
        with np.errstate(over="ignore"):
            stored = array.astype(self.dtype) if self.is_float and array.dtype.kind == "f" else array
        moments = name == MOMENTS
        what, other = ("latents", "another autoencoder") if moments else (f"values of field '{name}'", "others")
        fix = f"use --dtype float32 or {other}" if moments else "store it as float32"
        if array.shape != self.shape:
            raise DataError(f"{what} {array.shape} where {self.shape} were announced; use {other}")
        if stored.dtype != self.dtype:
            raise DataError(f"{what} of {array.dtype} where {self.dtype} were announced; convert it")
        if self.is_float:
            if not np.isfinite(array).all():
                raise DataError(f"{what} that are NaN or infinite; correct that input or use {other}")
            if moments and (array[1:] < 0).any():
                raise DataError(f"{what} with a negative standard deviation; use {other}")
            if not np.isfinite(stored).all():
                raise DataError(f"{what} that are not finite in {self.dtype}; {fix}")
        return png_bytes(stored) if self.is_png else npy_bytes(stored)

    def decode(self, data: bytes, name: str, where: str) -> np.ndarray:
        """The array in a member's bytes. Raises DataError naming `where` if it is not what was declared."""
        if self.is_png:
            return _decode_png(data, self.shape, where)
        array = parse_npy(data, self.shape, self.dtype, where)
        if self.is_float and not np.isfinite(array).all():
            raise DataError(f"{where} holds NaN or Inf; encode this image again and rebuild the shard")
        if name == MOMENTS and (array[1:] < 0).any():
            raise DataError(f"{where} holds a negative standard deviation (a log variance?); rebuild the shard")
        return array


@dataclass(frozen=True)
class Family:
    """Tars that hold some fields of every sample. A data set has one with the latents and labels, and one for each
    time that fields were added; all are cut into shards alike.
    """

    shards: tuple[ShardInfo, ...]
    fields: Mapping[str, Field]

    @property
    def members(self) -> tuple[str, ...]:
        label = {MOMENTS: (LABEL_MEMBER,)}
        return tuple(member for name, field in self.fields.items() for member in (field.member, *label.get(name, ())))


def png_bytes(image: np.ndarray) -> bytes:
    """PNG file of a uint8 [3, S, S] image."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(buffer, "PNG", optimize=False)
    return buffer.getvalue()


def _decode_png(data: bytes, shape: tuple[int, ...], where: str) -> np.ndarray:
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
