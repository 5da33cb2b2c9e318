"""Images from files, read a chunk at a time: an .npz, a folder, a tar, or a data set of shards, decoded."""

import io
import json
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dit_fast.autoencoders import Autoencoder
from dit_fast.autoencoders import of as autoencoder_of
from dit_fast.autoencoders.pixels import to_uint8
from dit_fast.data import LatentDataset
from dit_fast.data.description import FILE_NAME as DESCRIPTION
from dit_fast.data.files import is_ignored, weights_identity
from dit_fast.data.reader import IndexedReader
from dit_fast.errors import DataError, UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
IMAGE = "image"  # the field of shards that hold the pictures themselves


class ImageSet(Protocol):
    """A set of images of one size. name: for the protocol. identity: hash of what decides its content.

    place: where it lies on this machine, None for one elsewhere. size: (height, width). labels: how labels were
    chosen, None where nobody says. decoder: what made pixels of latents.
    """

    name: str
    identity: str
    place: Path | None
    count: int
    size: tuple[int, int]
    labels: str | None
    decoder: str | None

    def read(self, first: int, stop: int) -> np.ndarray:
        """Images first to stop - 1, uint8 [N, H, W, 3]. Reading onwards is fast. Raises DataError naming a bad one."""
        ...


class _Files:
    labels: str | None = None
    decoder: str | None = None
    name: str
    place: Path | None
    count: int
    size: tuple[int, int]

    def _checked(self, image: Any, where: str) -> np.ndarray:
        from PIL import Image

        try:
            with Image.open(image) as opened:
                if opened.mode not in ("RGB", "L", "P") or "transparency" in opened.info:
                    raise DataError(f"{where}: is {opened.mode}, not an RGB image; save it as 8-bit RGB")
                pixels = np.asarray(opened.convert("RGB"))
        except DataError:
            raise
        except Exception as error:  # damaged files raise many kinds
            raise DataError(f"{where}: not a readable image ({type(error).__name__}); replace or remove it") from None
        if getattr(self, "size", pixels.shape[:2]) != pixels.shape[:2]:
            raise DataError(f"{where}: is {pixels.shape[:2]}, the first image {self.size}; crop them to one size")
        return pixels


class FolderImages(_Files):
    """The image files of a folder and those below it, in the order of their names."""

    def __init__(self, folder: Path):
        found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        self._files = sorted(path for path in found if not any(map(is_ignored, path.relative_to(folder).parts)))
        if not self._files:
            raise DataError(f"{folder}: holds no image files ({', '.join(sorted(SUFFIXES))})")
        self.name, self.place, self.count = folder.name or str(folder), folder, len(self._files)
        names = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in self._files]
        self.identity = digest(names)
        self.size = self.read(0, 1).shape[1:3]
        drawn = folder / "sampling.json"  # of `dit-fast sample`, which adds dataset.json at the end
        if drawn.is_file():
            if not (folder / DESCRIPTION).is_file():
                raise DataError(f"{folder}: is not finished; give the command that draws it again")
            try:
                self.labels = json.loads(drawn.read_text())["options"]["labels"]
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{drawn}: damaged; remove it, or draw the images again") from None

    def read(self, first: int, stop: int) -> np.ndarray:
        return np.stack([self._checked(path, str(path)) for path in self._files[first:stop]])


class TarImages(_Files):
    """The image members of a tar, in the order in which they lie in it."""

    def __init__(self, path: Path):
        try:
            self._tar = tarfile.open(path, "r:")  # noqa: SIM115, read from while this lives
            members = self._tar.getmembers()
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"{path}: not a readable tar ({error}); it must not be compressed") from None
        images = [each for each in members if Path(each.name).suffix.lower() in SUFFIXES]
        if link := next((each.name for each in images if each.issym() or each.islnk()), None):
            raise DataError(f"{path}: '{link}' is a link; pack the images themselves (tar -h --hard-dereference)")
        self._members = [each for each in images if each.isfile()]
        if not self._members:
            raise DataError(f"{path}: holds no image files ({', '.join(sorted(SUFFIXES))})")
        self.name, self.place, self.count = path.name, path, len(self._members)
        self.identity = weights_identity("tar", [path])
        self.size = self.read(0, 1).shape[1:3]

    def read(self, first: int, stop: int) -> np.ndarray:
        return np.stack([self._member(member) for member in self._members[first:stop]])

    def _member(self, member: tarfile.TarInfo) -> np.ndarray:
        stream = self._tar.extractfile(member)
        assert stream is not None
        return self._checked(io.BytesIO(stream.read()), f"{self.name}: {member.name}")


class ArrayImages:
    """`arr_0` (uint8 [N, H, W, 3]) of an .npz, of which a chunk at a time is read."""

    decoder: str | None = None

    def __init__(self, path: Path):
        self._path, self.name = path, path.name
        self.place: Path | None = path
        self.labels: str | None = None
        try:
            self._archive = zipfile.ZipFile(path)
            self._stream = self._archive.open("arr_0.npy")
            version = np.lib.format.read_magic(self._stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(self._stream)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: holds no images arr_0 ({error}); see `dit-fast sample --out FILE.npz`") from None
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or not shape[0]:
            raise DataError(f"{path}: its arr_0 is {dtype} {shape}; it must be uint8 [N, H, W, 3]")
        self.count, self.size, self._start = shape[0], (shape[1], shape[2]), self._stream.tell()
        self.identity = weights_identity("npz", [path])
        if "text.npy" in self._archive.namelist():  # of `dit-fast sample`
            try:
                with np.load(path, allow_pickle=False) as file:
                    self.labels = "random" if "random labels" in str(file["text"]) else "balanced"
            except ValueError as error:
                raise DataError(f"{path}: damaged ({error}); draw it again") from None

    def read(self, first: int, stop: int) -> np.ndarray:
        stop, each = min(stop, self.count), self.size[0] * self.size[1] * 3
        try:
            self._stream.seek(self._start + first * each)
            data = self._stream.read((stop - first) * each)
        except (OSError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{self._path}: damaged ({error}); restore it") from None
        if len(data) != (stop - first) * each:
            raise DataError(f"{self._path}: is cut short; restore it")
        return np.frombuffer(data, np.uint8).reshape(stop - first, *self.size, 3)


class ShardImages:
    """The pictures of a data set where its shards hold them, else its latents' means, decoded.

    count: how many of them, evenly spaced over all; None: all.
    """

    labels: str | None = None

    def __init__(self, dataset: LatentDataset, count: int | None, device: torch.device):
        info = dataset.info
        total, self._device = len(dataset), device
        self.place = None if dataset.remote else Path(dataset.root)
        if count is not None and not 1 < count <= total:
            raise UserError(
                f"{dataset.root}: has {total} images, and {count} of them were asked for; ask for 2 to {total}"
            )
        self.count = count or total
        self._places = np.arange(self.count, dtype=np.int64) * total // self.count
        self._stored = IMAGE in info.fields
        self._decoder: Autoencoder | None = None if self._stored else autoencoder_of(dataset).to(device)
        self.decoder = None if self._decoder is None else self._decoder.identity
        self._reader = IndexedReader(dataset, (IMAGE,) if self._stored else ())
        how = "its pictures" if self._stored else f"latents decoded by {self.decoder}"
        self.name = f"data set {info.fingerprint[:12]}, {how}"
        self.identity = digest([info.fingerprint, self.count, self.decoder or ""])
        self.size = self.read(0, 1).shape[1:3]

    def read(self, first: int, stop: int) -> np.ndarray:
        places = self._places[first:stop]
        batch = self._reader.read(places, places)
        if self._decoder is None:
            return batch[IMAGE].numpy().transpose(0, 2, 3, 1)
        with torch.no_grad():
            decoded = self._decoder.decode(batch["moments"][:, 0].to(self._device).float())
        return to_uint8(decoded.float().cpu().numpy(), self.name, first)


def is_shards(path: Path) -> bool:
    """Whether a folder is a data set of ours, and not one of pictures with labels in a dataset.json."""
    try:
        return "shards" in json.loads((path / DESCRIPTION).read_text())
    except (OSError, ValueError, TypeError):
        return False


def open_images(path: Path) -> ImageSet:
    """A file or folder of images. Raises DataError where there is none, or of another kind."""
    if path.is_dir():
        return FolderImages(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix == ".npz":
        return ArrayImages(path)
    if path.suffix == ".tar":
        return TarImages(path)
    raise DataError(f"{path}: give a folder of images, an .npz with arr_0, or a .tar of images")


def digest(content: Sequence[Any]) -> str:
    """16 hex digits of the sha256 of JSON content."""
    import hashlib

    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
