"""Constants of a frozen TensorFlow graph (`GraphDef`), read from its protobuf bytes; TensorFlow is not needed.

Of the wire format only what such a file has: varints, 32 and 64-bit numbers, and fields of bytes. Numbers of fields are
those of tensorflow/core/framework/{graph,node_def,attr_value,tensor,tensor_shape}.proto.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_fast.errors import CheckpointError

FLOAT = 1  # DT_FLOAT


class Constants(dict[str, Tensor]):
    """float32 tensors by the names of their nodes. scaled: of nodes that normalise, whether they multiply by gamma."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled: dict[str, bool] = {}


def read_graph(path: Path) -> Constants:
    """Raises CheckpointError for a file that cannot be read or is no graph."""
    constants = Constants()
    try:
        data = memoryview(path.read_bytes())
        for number, node in _fields(data):
            if number == 1:
                _node(node, constants)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, IndexError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: is no TensorFlow graph, or is cut short ({error})") from None
    if not constants:
        raise CheckpointError(f"{path}: holds no constants; give a frozen graph, e.g. classify_image_graph_def.pb")
    return constants


def _node(data: memoryview, constants: Constants) -> None:
    name, kind, attributes = "", "", {}
    for number, value in _fields(data):
        if number == 1:
            name = _text(value)
        elif number == 2:
            kind = _text(value)
        elif number == 5:
            entry = dict(_fields(value))
            attributes[_text(entry[1])] = dict(_fields(entry[2])) if 2 in entry else {}
    if kind == "Const" and 8 in attributes.get("value", {}):
        tensor = _tensor(attributes["value"][8])
        if tensor is not None:
            constants[name] = tensor
    if "scale_after_normalization" in attributes:
        constants.scaled[name] = bool(attributes["scale_after_normalization"].get(5, 0))


def _tensor(data: memoryview) -> Tensor | None:
    """None for another type than float32."""
    shape: list[int] = []
    kind, content, values = 0, b"", []
    for number, value in _fields(data):
        if number == 1:
            kind = value
        elif number == 2:
            shape = [dict(_fields(dim)).get(1, 0) for field, dim in _fields(value) if field == 2]
        elif number == 4:
            content = bytes(value)
        elif number == 5:
            values.append(bytes(value))
    if kind != FLOAT:
        return None
    numbers = np.frombuffer(content or b"".join(values), "<f4")
    count = int(np.prod(shape, dtype=np.int64))
    if len(numbers) == 1 and count > 1:  # one value for all
        numbers = np.full(count, numbers[0])
    return torch.from_numpy(numbers.reshape(shape).astype(np.float32))


def _text(data: memoryview) -> str:
    return bytes(data).decode()


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of a message: a whole number, or the bytes of all else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"unknown type {kind} of a field")
        size = 8 if kind == 1 else 4
        if kind == 2:
            size, at = _varint(data, at)
        if at + size > len(data):
            raise ValueError("a field reaches beyond the end")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number has more than 64 bits")
