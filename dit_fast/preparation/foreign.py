"""Latents as others hold them, read in place: safetensors of LightningDiT, Hugging Face's Arrow and Parquet, tars.

Every reader knows its labels beforehand and gives one array per number. No pickle is read but the statistics of
LightningDiT (`latents_stats.pt`), by torch's weights-only reader.
"""

import io
import json
import math
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dit_fast.data.files import read_npy, reason, shown
from dit_fast.errors import ConfigError, DataError

_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}\.parquet")  # as the Hub and `datasets` name the files of a split
LATENTS, LABELS = ("latents", "latent"), ("labels", "label", "cls", "class")  # usual names of columns and members


class Latents(ABC):
    """N latents with labels. files: all that decides them, relative to root. class_names: where the source has some.
    scale, shift: what it says of model space, None where it says nothing. left_out: what it also holds, for people.
    """

    kind: str
    files: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...] | None = None
    scale: list[float] | None = None
    shift: list[float] | None = None
    left_out: tuple[str, ...] = ()

    def __init__(self, root: Path):
        self.root = root
        self._open: dict[Any, Any] = {}  # of this process

    @abstractmethod
    def name(self, number: int) -> str:
        """What a message calls it."""

    @abstractmethod
    def read(self, number: int) -> np.ndarray:
        """As it is stored. Raises what the library of the format raises."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


class Safetensors(Latents):
    """LightningDiT's extract_features.py: files with `latents` [n, C, h, w], `labels` [n] and `latents_flip`."""

    kind = "LightningDiT safetensors"

    def __init__(self, root: Path, latents: str | None, labels: str | None):
        super().__init__(root)
        found = tuple(sorted(path.name for path in root.glob("*.safetensors")))
        parts, self.starts, names = [], [0], set()
        for name in found:
            with _reading(root / name):
                file = self._file(name)
                keys = set(file.keys())
                self.latents = _named(latents, LATENTS, keys, root / name, "latents")
                part = file.get_tensor(_named(labels, LABELS, keys, root / name, "labels")).numpy()
                count = file.get_slice(self.latents).get_shape()[0]
            if part.shape != (count,) or part.dtype.kind not in "iu":
                raise DataError(
                    f"{root / name}: {count} latents and labels {part.dtype} {part.shape}; one whole number each is "
                    "needed, extract it again"
                )
            parts.append(part)
            names |= keys
            self.starts.append(self.starts[-1] + count)
        self.files, self.labels = found, np.concatenate(parts)
        self.left_out = tuple(sorted(name for name in names if name.endswith("_flip")))
        if (statistics := root / "latents_stats.pt").exists():
            self.files = (*found, statistics.name)
            self._scaling(statistics)

    def _file(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._open:
            self._open = {name: safe_open(self.root / name, "pt")}  # one: they are read in order
        return self._open[name]

    def _place(self, number: int) -> tuple[str, int]:
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.files[part], number - self.starts[part]

    def _scaling(self, path: Path) -> None:
        """(z - mean) / std, as LightningDiT's loader."""
        import torch

        with _reading(path):
            content = torch.load(path, map_location="cpu", weights_only=True)
            mean, std = (content[name].double().flatten().tolist() for name in ("mean", "std"))
        if not all(value > 0 and math.isfinite(value) for value in std):
            raise DataError(f"{path}: a standard deviation is not above 0; compute it again")
        self.scale = [1 / value for value in std]
        self.shift = [-value / each for value, each in zip(mean, std, strict=True)]

    def name(self, number: int) -> str:
        name, row = self._place(number)
        return f"{shown(self.root / name)}, row {row}"

    def read(self, number: int) -> np.ndarray:
        name, row = self._place(number)
        found = self._file(name).get_slice(self.latents)[row]
        return (found.float() if found.is_floating_point() else found).numpy()  # numpy has no bfloat16


class Columns(Latents):
    """A data set of Hugging Face: a folder of `save_to_disk` (Arrow), or Parquet files."""

    def __init__(self, root: Path, files: Sequence[Path], latents: str | None, labels: str | None):
        super().__init__(root)
        _pyarrow()
        self.files = tuple(path.relative_to(root).as_posix() for path in files)
        self.kind = "Parquet" if self.files[0].endswith(".parquet") else "Arrow"
        self.groups: list[tuple[str, int]] = []  # of rows, as they are read
        self.starts, parts = [0], []
        for name in self.files:
            with _reading(root / name):
                schema, sizes = self._sizes(name)
                self.latents = _named(latents, LATENTS, schema.names, root / name, "latents")
                label = _named(labels, LABELS, schema.names, root / name, "labels")
                for group, rows in enumerate(sizes):
                    self.groups.append((name, group))
                    self.starts.append(self.starts[-1] + rows)
                    parts.append(self._group(name, group, label).to_numpy(zero_copy_only=False))
                if self.class_names is None:
                    self.class_names = _class_names(root, schema, label)
        self.labels = np.concatenate(parts)
        if self.labels.dtype.kind not in "iu":
            raise DataError(f"{root}: column '{label}' holds {self.labels.dtype}, not whole numbers; name another")

    def _file(self, name: str) -> Any:
        pyarrow = _pyarrow()
        if name not in self._open:
            if self.kind == "Parquet":
                self._open = {name: pyarrow.parquet.ParquetFile(self.root / name, memory_map=True)}
            else:
                with pyarrow.memory_map(str(self.root / name)) as source:
                    self._open = {name: pyarrow.ipc.open_stream(source).read_all()}
        return self._open[name]

    def _sizes(self, name: str) -> tuple[Any, list[int]]:
        file = self._file(name)
        if self.kind == "Parquet":
            groups = range(file.metadata.num_row_groups)
            return file.schema_arrow, [file.metadata.row_group(group).num_rows for group in groups]
        return file.schema, [file.num_rows]

    def _group(self, name: str, group: int, column: str) -> Any:
        """Values of one column, as one array."""
        key = (name, group, column)
        if key not in self._open:
            file = self._file(name)
            table = file.read_row_group(group, columns=[column]) if self.kind == "Parquet" else file
            array = table.column(column).combine_chunks()
            self._open[key] = getattr(array, "storage", array)  # without the wrapper of `datasets`
        return self._open[key]

    def _place(self, number: int) -> tuple[str, int, int]:
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        return (*self.groups[part], number - self.starts[part])

    def name(self, number: int) -> str:
        name, group, row = self._place(number)
        return (
            f"{shown(self.root / name)}, " + (f"row group {group}, " if self.kind == "Parquet" else "") + f"row {row}"
        )

    def read(self, number: int) -> np.ndarray:
        name, group, row = self._place(number)
        for key in [key for key in self._open if isinstance(key, tuple) and key[:2] != (name, group)]:
            del self._open[key]
        value = self._group(name, group, self.latents)[row].as_py()
        if isinstance(value, bytes):
            return read_npy(io.BytesIO(value), len(value))
        array = np.array(value)  # what is not of floats is refused where it is used
        return array.astype(np.float32) if array.dtype.kind == "f" else array


class Tars(Latents):
    """Plain WebDataset tars: KEY.npy and KEY.cls (or KEY.json with a label), samples in the order of the tars."""

    kind = "WebDataset tars"

    def __init__(self, root: Path, latents: str | None, labels: str | None):
        super().__init__(root)
        self.files = tuple(sorted(path.name for path in root.glob("*.tar")))
        self.entries: list[tuple[int, str, int, int]] = []  # tar, key, where its array begins, bytes
        found: list[int] = []
        for part, name in enumerate(self.files):
            with _reading(root / name), tarfile.open(root / name, "r:") as archive:
                for key, members in _samples(archive):
                    there = f"{shown(root / name)}: sample '{shown(key)}'"
                    arrays = [ending for ending in members if ending.split(".")[-1] == "npy"]
                    ending = _named(latents, (), members, there, "latents", arrays)
                    label = _named(labels, ("cls", "label", "json"), members, there, "labels")
                    member = members[ending]
                    self.entries.append((part, key, member.offset_data, member.size))
                    found.append(_label(archive, members[label], there))
        self.labels = np.array(found, np.int64)

    def name(self, number: int) -> str:
        part, key, *_ = self.entries[number]
        return f"{shown(self.root / self.files[part])}, sample '{shown(key)}'"

    def read(self, number: int) -> np.ndarray:
        part, _, offset, size = self.entries[number]
        if part not in self._open:
            self._open = {part: (self.root / self.files[part]).open("rb")}
        file = self._open[part]
        file.seek(offset)
        return read_npy(io.BytesIO(file.read(size)), size)


def open_latents(root: Path, latents: str | None = None, labels: str | None = None) -> Latents:
    """The latents in a folder, by what lies there. Raises DataError where that is nothing known."""
    if not root.is_dir():
        raise DataError(f"{shown(root)}: is no folder; give one with safetensors, Arrow, Parquet or tar files")
    if any(root.glob("*.safetensors")):
        return Safetensors(root, latents, labels)
    if (root / "state.json").exists():
        with _reading(root / "state.json"):
            names = [item["filename"] for item in json.loads((root / "state.json").read_text())["_data_files"]]
            if not names or any(Path(name).name != name for name in names):
                raise ValueError("it must list files of its own folder")
        return Columns(root, [root / name for name in names], latents, labels)
    if parquet := sorted(root.rglob("*.parquet")):
        splits = {match[1]: path for path in parquet if (match := _SPLIT.fullmatch(path.name))}
        if len(splits) > 1:
            raise ConfigError(
                f"{shown(root)}: holds several splits ({', '.join(splits)}), of which one data set would be made; put "
                "the files of one into a folder of their own"
            )
        return Columns(root, parquet, latents, labels)
    if any(root.glob("*.tar")):
        return Tars(root, latents, labels)
    raise DataError(
        f"{shown(root)}: holds no latents that are known: *.safetensors (LightningDiT), state.json with *.arrow "
        "(save_to_disk of Hugging Face's datasets), *.parquet, *.tar (WebDataset), or dataset.json (vae-sd)"
    )


def _named(given: str | None, usual: Sequence[str], names: Any, where: Any, what: str, only: Sequence[str] = ()) -> str:
    """The column or member to read: the one that was named, or the one with a usual name, or the only candidate."""
    names = sorted(names)
    if given is not None:
        if given not in names:
            raise ConfigError(f"{where}: has no '{given}' for --{what}; there are {', '.join(names)}")
        return given
    found = [name for name in names if name in usual] or list(only)
    if len(found) != 1:
        raise ConfigError(f"{where}: which of {', '.join(names)} holds the {what}? name it with --{what}")
    return found[0]


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Members by key, as WebDataset groups them: neighbours whose names agree up to the first dot of the last part."""
    key: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    for member in archive:
        if not member.isfile():
            continue
        folder, slash, last = member.name.rpartition("/")
        stem, _, ending = last.partition(".")
        if (own := folder + slash + stem) != key:
            if members:
                yield str(key), members
            key, members = own, {}
        members[ending] = member
    if members:
        yield str(key), members


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> int:
    file = archive.extractfile(member)
    try:
        content = json.loads(file.read() if file else b"")
        value = content["label"] if isinstance(content, dict) else content
        if type(value) is not int:
            raise ValueError("not a whole number")
        return value
    except (ValueError, KeyError) as error:
        raise DataError(
            f"{where}: no label in '{shown(member.name)}' ({reason(error)}); name it with --labels"
        ) from None


def _class_names(root: Path, schema: Any, label: str) -> tuple[str, ...] | None:
    """What `datasets` recorded of the label column."""
    if (info := root / "dataset_info.json").exists():
        features: Any = json.loads(info.read_text()).get("features")
    else:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features")
    column = (features or {}).get(label)
    names = column.get("names") if isinstance(column, Mapping) else None
    return tuple(map(str, names)) if names else None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What a damaged file raises, as one line that names it."""
    try:
        yield
    except (ConfigError, DataError):
        raise
    except Exception as error:  # the libraries of the formats raise many kinds
        raise DataError(f"{shown(path)}: cannot be read ({reason(error)}); restore it") from None


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Arrow and Parquet need pyarrow; run `pip install 'dit_fast[import]'`") from None
    return pyarrow
