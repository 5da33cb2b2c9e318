"""Adding fields to a finished data set, in tars of their own with the same keys; no existing shard is touched.

The tars are written as a build writes its own. Nothing names them until `dataset.json` is replaced, last, so a run that
has the data set open is not disturbed and a killed call leaves nothing visible.
"""

import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dit_fast import files
from dit_fast.data.batch import open_columns
from dit_fast.data.dataset import LatentDataset, open_dataset
from dit_fast.data.description import FIELD_NAME, FILE_NAME, description_bytes, field_entry
from dit_fast.data.field import DTYPES, RESERVED, Field
from dit_fast.data.files import digest_files, reason, shown
from dit_fast.data.json_object import MAX_DIMENSIONS, MAX_VALUES
from dit_fast.data.writer import Producer, Unfinished, check_amounts, read_json, write_shards, writing
from dit_fast.errors import ConfigError, DataError
from dit_fast.options import diff


def add_field(
    shards: str | Path, name: str, array: str | Path, *, dtype: str | None = None, processes: int = 1,
    progress: bool = True,
) -> LatentDataset:  # fmt: skip
    """Adds the field `name` from an `.npy` file [num_samples, ...]: row i belongs to the sample with key i.

    shards: folder of the data set. dtype: "float16" or "float32", what floats are stored as (default: the file's own).
    The file is mapped, not loaded. Run again, it continues or finds itself done. Returns the data set, opened again.
    Raises DataError or ConfigError, one line: a name that is taken or not [a-z_]+, another number of samples, a dtype
    that no field has, NaN or Inf (naming the sample).
    """
    dataset, path = open_dataset(shards), Path(array)
    check_names(dataset, [name])
    producer = _ArrayProducer(path, name, dtype)
    if producer.count != len(dataset):
        raise DataError(
            f"{shown(path)}: holds {producer.count} rows, {dataset.root} has {len(dataset)} samples; give one row for "
            "each, in the order of their keys"
        )
    digest = digest_files(path.parent, [path.name], False)
    producer.fields[name] = dataclasses.replace(producer.fields[name], source=f"array:{digest[:16]}")
    return add_fields(dataset, producer, np.arange(len(dataset)), {"array": digest}, processes, progress)


def check_names(dataset: LatentDataset, names: Iterable[str]) -> None:
    """Raises ConfigError for what is no name of a field, DataError for one that lies beside the latents and for data
    sets that cannot be added to.
    """
    if dataset.remote:
        raise DataError(f"{dataset.root}: fields are added to local data sets only; download it first")
    for name in names:
        if not FIELD_NAME.fullmatch(name) or name in RESERVED:
            raise ConfigError(
                f"'{shown(name)}' is no name for a field; use small letters and _, beginning with a letter, and none "
                f"of {', '.join(RESERVED)}"
            )
        if name in dataset.info.fields and not dataset.info.fields[name].shards:
            raise DataError(f"{dataset.root}: has a field '{name}' already, beside the latents; give another name")


def add_fields(
    dataset: LatentDataset,
    producer: Producer,
    order: np.ndarray,
    settings: Mapping[str, Any],
    processes: int,
    progress: bool,
) -> LatentDataset:
    """Adds what `producer` gives, in one family of tars. order: the source number of each key, int64 [num_samples].

    settings: everything besides the fields that decides the bytes. The caller has seen to `check_names`. Raises
    DataError, one line; finished tars are kept.
    """
    check_amounts(1, processes)
    image = producer.fields.get("image")
    if image and (image.dtype != "uint8" or image.shape != (3, *2 * image.shape[-1:])):
        raise DataError(
            f"{dataset.root}: a field 'image' holds pictures, uint8 [3, S, S], not {image.dtype} {list(image.shape)}; "
            "give another name"
        )
    out, info = Path(dataset.root), dataset.info
    declared = {name: field_entry(field) for name, field in producer.fields.items()}
    full = {"fields": declared, "dataset": info.fingerprint, **settings}
    if not _is_there(out, full):
        with writing(Unfinished(out, next(iter(producer.fields))), full) as state:
            results = write_shards(state, producer, order, info.shard_sizes, processes, progress)
            own = {"settings": full, "shards": [result["shard"] for result in results]}
            with _alone(out):
                if not _is_there(out, full):
                    content = read_json(out / FILE_NAME)
                    added = {name: {**entry, **own} for name, entry in declared.items()}
                    content["fields"] = {**content.get("fields", {}), **added}
                    files.replace(out / FILE_NAME, description_bytes(content))
    dataset = open_dataset(out)
    open_columns(dataset, tuple(producer.fields))  # their shards can be opened too
    return dataset


def _is_there(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the data set has just these fields. DataError for a name that is taken and for another data set."""
    content = read_json(out / FILE_NAME)
    if content.get("fingerprint") != settings["dataset"]:
        raise DataError(f"{out}: is another data set than when this call began; run it again")
    there = {name: entry for name, entry in content.get("fields", {}).items() if name in settings["fields"]}
    for name, entry in there.items():
        changes = diff(entry["settings"], json.loads(json.dumps(settings)))
        if changes:
            raise DataError(f"{out}: has a field '{name}' already ({'; '.join(changes)}); give another name")
    return bool(there)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """The only one to replace `dataset.json`; two different fields may be added at the same time."""
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class _ArrayProducer:
    def __init__(self, path: Path, name: str, dtype: str | None):
        self.path = path
        array, where = self._mapped(), shown(path)
        found = array.dtype.name if array.dtype.isnative else array.dtype.str
        if dtype not in (None, "float16", "float32") or (dtype and array.dtype.kind != "f"):
            raise ConfigError(f"dtype '{dtype}' for an array of {found}: floats are stored as float16 or float32")
        if (dtype or found) not in DTYPES:
            fix = "give --dtype float16 or float32" if array.dtype.kind == "f" else "convert it"
            raise DataError(f"{where}: is {found}; valid are {', '.join(DTYPES)}; {fix}")
        shape = array.shape[1:]
        if not array.ndim or not array.size or len(shape) > MAX_DIMENSIONS or math.prod(shape) > MAX_VALUES:
            raise DataError(f"{where}: is an array {array.shape}; give [num_samples, ...], not empty")
        self.count, self.fields = len(array), {name: Field(f"{name}.npy", shape, dtype or found)}

    def name(self, number: int) -> str:
        return f"{shown(self.path)}, row {number}"

    def samples(self, numbers: np.ndarray, shard: int) -> Iterator[tuple[dict[str, np.ndarray], None]]:
        (name,), array = self.fields, self._mapped()
        for number in numbers.tolist():
            yield {name: np.asarray(array[number])}, None

    def _mapped(self) -> np.ndarray:
        try:
            return np.lib.format.open_memmap(self.path, mode="r")
        except OSError as error:
            raise DataError(f"{shown(self.path)}: cannot be read ({reason(error)})") from None
        except Exception as error:  # the header is parsed as Python: damage raises many kinds
            raise DataError(f"{shown(self.path)}: not an .npy array ({reason(error)}); write it with np.save") from None
