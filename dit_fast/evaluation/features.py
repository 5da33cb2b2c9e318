"""Features of many images: a part per chunk on the disk, so that ranks share the work and a killed command goes on.

Chunks have fixed borders and are summed in order, so that neither ranks nor restarts change a bit of what is measured.
"""

import hashlib
import json
import logging
import re
import shutil
import time
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from dit_fast.data.files import weights_identity
from dit_fast.errors import DataError, UserError
from dit_fast.evaluation.metrics import Moments, MomentSums
from dit_fast.evaluation.networks import Network, in_batches
from dit_fast.evaluation.sources import ArrayImages, ImageSet, digest
from dit_fast.files import sync
from dit_fast.world import World

logger = logging.getLogger("dit_fast")

CHUNK = 256  # images of a part, of images from files
POLL = 0.2  # seconds between looks for the parts of other ranks
ROWS = 10_000  # features of a reference that neighbours and kernels are of, as ADM's files have it
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_NAME = re.compile(r"features_(\d{10})\.npz")


@dataclass(frozen=True)
class Features:
    """Of a set of images: moments by name of feature, and rows [N, D], float32, of those that are wanted whole.

    count: None where a file of statistics does not say. More rows than ROWS are only kept of samples.
    """

    count: int | None
    moments: Mapping[str, Moments]
    rows: Mapping[str, Tensor] = field(default_factory=dict)


class FeatureParts:
    """FOLDER/features_FIRST.npz, of one chunk each, in a folder whose name is the digest of what they are of.

    content: everything that decides the features. total, chunk: images in all, and of a part.
    """

    def __init__(self, parent: Path, content: Any, total: int, chunk: int):
        self.folder, self.total, self.chunk = parent / digest([content, total, chunk]), total, chunk
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "description.json"
        if not path.exists():
            with _replacing(path) as file:
                file.write(json.dumps({"of": content, "images": total, "chunk": chunk}, indent=1).encode())

    def done(self) -> set[int]:
        """First images of the chunks that are there."""
        return {int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))}

    def whole(self) -> bool:
        """Whether all chunks are there."""
        return len(self.done()) == -(-self.total // self.chunk)

    def add(self, first: int, features: Mapping[str, Tensor], **more: Any) -> None:
        with _replacing(self._path(first)) as file:
            _savez(file, {name: x.numpy() for name, x in features.items()} | more)

    def read(self, first: int) -> dict[str, np.ndarray]:
        """Waits for a part that another rank is making."""
        path = self._path(first)
        while not path.exists():
            time.sleep(POLL)
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            raise DataError(f"{path}: damaged; remove it and give the same command again") from None

    def gather(self, whole: Iterable[str], most: int | None = None) -> Features:
        """All parts in order. whole: names of features whose rows are kept; most: rows evenly spaced over all."""
        sums: dict[str, MomentSums] = {}
        rows: dict[str, list[Tensor]] = {name: [] for name in whole}
        every = self.total if most is None or most > self.total else most
        wanted = np.arange(every, dtype=np.int64) * self.total // every
        for first in range(0, self.total, self.chunk):
            part = {name: torch.from_numpy(x) for name, x in self.read(first).items() if x.ndim == 2}
            inside = wanted[(wanted >= first) & (wanted < first + self.chunk)] - first
            for name, x in part.items():
                if name in rows:
                    rows[name].append(x[torch.from_numpy(inside)])
                if name in STATISTICS:
                    sums.setdefault(name, MomentSums()).add(x)
        moments = {name: each.moments() for name, each in sums.items()}
        return Features(self.total, moments, {name: torch.cat(x) for name, x in rows.items() if x})

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, first: int) -> Path:
        return self.folder / f"features_{first:010d}.npz"


def extract(
    images: ImageSet, network: Network, parts: FeatureParts, world: World, step: Callable[[int], object]
) -> None:
    """This rank's share: every `world.size`-th chunk from the rank's own on. step: told of images done."""
    done = parts.done()
    for first in range(world.rank * parts.chunk, parts.total, world.size * parts.chunk):
        stop = min(first + parts.chunk, parts.total)
        if first not in done:
            parts.add(first, in_batches(network, torch.from_numpy(images.read(first, stop).copy())))
        step(stop - first)


@dataclass(frozen=True)
class Reference:
    """What samples are compared with. name, identity: for the protocol. size: of its images, where it is of images."""

    name: str
    identity: str
    features: Features
    size: tuple[int, int] | None = None


class ReferenceSource:
    """A reference as it was given: statistics in an .npz of ADM or torch-fidelity, or a set of images.

    Features of images are kept beside them, in PLACE.features/reference_DIGEST.npz, for all runs: itself such a file
    (mu, sigma, mu_s, sigma_s, count, rows, the network's identity, and the sha256 of all that). DIGEST is of the
    images, their number, the network and its resizing. Where nothing can be written there it lies in `folder`.
    """

    def __init__(self, given: Path | ImageSet, network: Network, folder: Path):
        self._network, self._folder = network, folder
        self._path: Path | None = None
        self.images: ImageSet | None = None
        if isinstance(given, Path):
            self._path, self.name, self.identity = given, given.name, weights_identity("reference", [given])
            if "arr_0.npy" in _members(given) and network.kind != "torch-fidelity":
                self.images = ArrayImages(given)
        else:
            self.images, self.name, self.identity = given, given.name, given.identity
        self.parts: FeatureParts | None = None
        if self.images is not None:
            count, resizing = self.images.count, network.resizing(self.images.size)
            name = f"reference_{digest([self.identity, count, network.identity, resizing])}.npz"
            place = self.images.place
            self._places = [*([] if place is None else [beside(place) / name]), folder / name]
            if self._kept() is None:
                content = {"reference": self.identity, "network": network.identity}
                self.parts = FeatureParts(folder / "parts", content, count, CHUNK)

    def extract(self, world: World, step: Callable[[int], object]) -> None:
        if self.parts is not None and self.images is not None:
            extract(self.images, self._network, self.parts, world, step)

    def read(self) -> Reference:
        """On rank 0, once every rank extracts. Raises DataError for a file that holds no statistics of this network."""
        given = None if self._path is None else read_statistics(self._path, self._network)
        if self.parts is not None:
            while not self.parts.whole() and self._kept() is None:  # other ranks leave it where another run was faster
                time.sleep(POLL)
            if self._kept() is None:
                features = self.parts.gather(["pool"], ROWS)
                if given is not None:  # of ADM: the moments are of the whole training set, the images 10,000 of them
                    features = Features(given.count, given.moments, features.rows)
                self._keep(features)
            self.parts.remove()
        kept = self._kept()
        found = given if kept is None else read_statistics(kept, self._network)
        assert found is not None, "a reference without images is a file of statistics"
        size = None if self.images is None or given is not None else self.images.size
        return Reference(self.name, self.identity, found, size)

    def _kept(self) -> Path | None:
        return None if self.images is None else next((path for path in self._places if path.exists()), None)

    def _keep(self, features: Features) -> None:
        for path in self._places:
            try:
                write_statistics(path, features, self._network)
                return
            except OSError as error:
                if path == self._places[-1]:
                    raise
                reason = error.strerror or type(error).__name__
                logger.info("%s: cannot be written (%s); kept for this run alone, in %s", path, reason, self._folder)


def beside(place: Path) -> Path:
    """The folder for features of the images that lie there."""
    place = place.resolve()
    return place.with_name(f"{place.name}.features")


def is_statistics(path: Path) -> bool:
    """Whether an .npz holds moments, with or without images beside them."""
    return path.suffix == ".npz" and path.is_file() and {"mu.npy", "sigma.npy"} <= set(_members(path))


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a readable .npz ({error}); restore it") from None


def write_statistics(path: Path, features: Features, network: Network) -> None:
    content: dict[str, Any] = {"network": np.array(network.identity)}
    for name, (mean, covariance) in STATISTICS.items():
        if name in features.moments:
            content[mean], content[covariance] = features.moments[name].mean, features.moments[name].covariance
    if features.count is not None:
        content["count"] = np.int64(features.count)
    content |= {f"rows_{name}": x for name, x in features.rows.items()}
    content["sha256"] = np.array(_sha256(content))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as file:
        _savez(file, content)
        sync(file)


def _sha256(content: Mapping[str, Any]) -> str:
    """Of all arrays, with their names, types and shapes."""
    found = hashlib.sha256()
    for name in sorted(content):
        array = np.ascontiguousarray(content[name])
        found.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        found.update(array.tobytes())
    return found.hexdigest()


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """As `files.replacing`, where several processes may write the same at once."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _savez(file: BinaryIO, content: Mapping[str, Any]) -> None:
    arrays: dict[str, Any] = {name: np.asarray(x) for name, x in content.items()}
    np.savez(file, **arrays)


def read_statistics(path: Path, network: Network) -> Features:
    """Moments, and rows where the file has them. Raises DataError for a damaged file or one of another network."""
    try:
        with np.load(path, allow_pickle=False) as file:
            held = set(file.files)
            if "network" in held and str(file["network"]) != network.identity:
                raise UserError(f"{path}: is of {file['network']}, not of {network.identity}; use one network for both")
            if "sha256" in held and str(file["sha256"]) != _sha256({key: file[key] for key in held - {"sha256"}}):
                raise ValueError("its content is not what was written")
            moments, count = {}, int(file["count"]) if "count" in held else None
            for name, (mean, covariance) in STATISTICS.items():
                if {mean, covariance} <= held:
                    mu, sigma = (torch.from_numpy(file[key].astype(np.float64)) for key in (mean, covariance))
                    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
                        raise ValueError(f"{mean} and {covariance} do not fit together")
                    moments[name] = Moments(mu, sigma, count)
            rows = {key.removeprefix("rows_"): torch.from_numpy(file[key]) for key in held if key.startswith("rows_")}
    except UserError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: holds no whole statistics of features ({error}); restore it, or remove one that evaluate has made"
        ) from None
    if "pool" not in moments:
        raise DataError(f"{path}: has no mu and sigma; give ADM's or torch-fidelity's .npz, images, or shards")
    return Features(count, moments, rows)
