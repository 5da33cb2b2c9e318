"""Sources of labelled images: a folder (class = sorted folder name) or an array data set."""

import hashlib
import os
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
from PIL import Image

from dit_fast.data.address import reading
from dit_fast.data.files import check_utf8, digest_files, is_ignored, read_npy, reason, shown
from dit_fast.errors import DataError
from dit_fast.preparation.images import SUFFIXES, center_crop, read_image

MAX_DEFLATE = 1032  # deflate cannot pack more bytes than this into one


class ImageSource(Protocol):
    """Labelled images by number. labels: int64 [N]. digest: of names, labels and content; moving changes nothing."""

    labels: np.ndarray
    class_names: tuple[str, ...]
    digest: str

    def read(self, index: int, size: int) -> np.ndarray:
        """uint8 [size, size, 3], cropped. Raises DataError naming the image."""
        ...

    def name(self, index: int) -> str:
        """What a message calls this image."""
        ...


class FolderSource:
    """Images in class folders, at any depth below them; classes and files in the order of torchvision's ImageFolder.

    Skipped: names that begin with a dot, folders that systems make (`SYSTEM_FOLDERS`), the folder `out`, files without
    an image suffix (counted in `notes`). Links are followed. exif: see `read_image`. Raises DataError naming the
    culprit: no class folder, a class without images, a folder or file that cannot be read, a link to nothing or into a
    folder above it, a name that is not UTF-8.
    """

    def __init__(self, root: Path, *, out: Path | None = None, exif: bool = True, progress: bool = False):
        self.root, self.exif = root, exif
        walk = _Walk(root, out)
        self.class_names = tuple(walk.classes)
        self.files = [name for names in walk.classes.values() for name in names]
        sizes = [len(names) for names in walk.classes.values()]
        self.labels = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
        kinds = ", ".join(
            f"{count} {kind}" for kind, count in sorted(walk.skipped.items(), key=lambda item: (-item[1], item[0]))
        )
        self.notes = walk.notes
        if kinds:
            count = walk.skipped.total()
            self.notes.append(f"{shown(root)}: skipped {count} file{'s' * (count > 1)}: {kinds}")
        content = digest_files(root, self.files, progress)
        self.digest = hashlib.sha256(repr((self.class_names, sizes, content)).encode()).hexdigest()

    def read(self, index: int, size: int) -> np.ndarray:
        return read_image(self.root / self.files[index], size, self.exif)

    def name(self, index: int) -> str:
        return shown(self.root / self.files[index])


class _Walk:
    """classes: name -> its images, relative to the root. skipped: kind of file -> how many."""

    def __init__(self, root: Path, out: Path | None):
        self.root, self.skipped, self.notes = root, Counter[str](), list[str]()
        real = os.path.realpath(root)
        self._out = os.path.realpath(out) if out else None
        if real == self._out:
            raise DataError(f"{shown(root)}: is both source and output; choose another folder for the output")
        if self._is_in(real, self._out):
            self._out = None  # everything here lies in the output, so no folder below can be it
        self.classes: dict[str, list[str]] = {}
        above, prefix = (self._identity(str(root)),), os.path.join(root, "")
        for entry in self._entries(str(root)):
            if self._is_folder(entry):
                if not self._is_ignored(entry):
                    found = sorted(self._images(entry.path, above))
                    if not found and self._is_in(self._out, entry.path):
                        continue  # made for the output, or it would be a class without images
                    self.classes[entry.name] = [os.path.join(folder, name)[len(prefix) :] for folder, name in found]
            else:
                kind = os.path.splitext(entry.name)[1].lower() or "without suffix"
                self.skipped[f"{shown(kind)} outside the class folders"] += 1
        empty = [name for name, files in self.classes.items() if not files]
        where = shown(root)
        if len(empty) == len(self.classes):
            raise DataError(
                f"{where}: no images in class folders; expected {where}/CLASS/IMAGE.png (or jpg, webp, ...)"
            )
        if empty:
            raise DataError(
                f"{where}: no images in class folder '{shown(empty[0])}' ({len(empty)} such); remove it or add images"
            )

    def _images(self, top: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, str]]:
        """(folder, file name) of every image below `top`. above: the folders it lies in, to notice a cycle."""
        pending = [(top, above)]
        while pending:
            folder, above = pending.pop()
            identity = self._identity(folder)
            if identity in above:
                raise DataError(f"{shown(folder)}: a link to a folder above it, so it never ends; remove it")
            for entry in self._entries(folder):
                if self._is_folder(entry):
                    if not self._is_ignored(entry):
                        pending.append((entry.path, (*above, identity)))
                    continue
                suffix = os.path.splitext(entry.name)[1].lower()
                if suffix in SUFFIXES:
                    if not entry.is_file():
                        raise DataError(f"{shown(entry.path)}: neither a file nor a folder; remove it")
                    yield folder, entry.name
                else:
                    self.skipped[shown(suffix) or "without suffix"] += 1

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as found:
                entries = sorted(
                    (entry for entry in found if not entry.name.startswith(".")), key=lambda item: item.name
                )
        except OSError as error:
            raise _unlisted(folder, error) from None
        for entry in entries:
            check_utf8(entry.name, f"{shown(folder)}: the name")
        return entries

    def _is_folder(self, entry: os.DirEntry[str]) -> bool:
        try:
            if entry.is_dir():
                return True
            entry.stat()  # a link to nothing
        except OSError as error:
            kind = "a link to nothing" if isinstance(error, FileNotFoundError) else f"cannot be read ({reason(error)})"
            raise DataError(f"{shown(entry.path)}: {kind}; restore or remove it") from None
        return False

    def _is_ignored(self, entry: os.DirEntry[str]) -> bool:
        if is_ignored(entry.name):
            return True
        if not self._is_in(entry.path, self._out):
            return False
        names = (name for _, _, files in os.walk(entry.path) for name in files)
        if any(os.path.splitext(name)[1].lower() in SUFFIXES for name in names):
            self.notes.append(f"{shown(entry.path)}: skipped as the output folder, although it holds images")
        return True

    @staticmethod
    def _is_in(path: str | None, folder: str | None) -> bool:
        """Whether the path is that folder or lies in it, links followed; False where one of them is None."""
        if path is None or folder is None:
            return False
        return f"{os.path.realpath(path)}/".startswith(f"{os.path.realpath(folder)}/")

    @staticmethod
    def _identity(folder: str) -> tuple[int, int]:
        try:
            status = os.stat(folder)
        except OSError as error:
            raise _unlisted(folder, error) from None
        return status.st_dev, status.st_ino


def _unlisted(folder: str, error: OSError) -> DataError:
    return DataError(
        f"{shown(folder)}: cannot be listed ({reason(error)}), so its images would be missing; make it readable or "
        "move it away"
    )


class ArraySource:
    """An `.npz` with `images` uint8 [N, H, W] or [N, H, W, 3], `labels` int [N] and optionally `class_names` [K].

    Without names, every class in 0..largest label must have an image; with them, classes without images are named in
    `notes`. Raises DataError naming the file and the array that is missing or has a wrong shape, dtype or value.
    """

    def __init__(self, path: Path):
        self.path = path
        arrays = self._load("images", "labels", "class_names")
        for name in ("images", "labels"):
            if name not in arrays:
                raise DataError(f"{shown(path)}: has no array '{name}'; expected images [N, H, W(, 3)] and labels [N]")
        images, labels = arrays["images"], arrays["labels"]
        self._images: np.ndarray | None = images
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
            self._refuse(
                f"images are {images.dtype} {images.shape}, expected uint8 [N, H, W] or [N, H, W, 3]; scale other "
                "ranges to 0..255 first"
            )
        if 0 in images.shape:
            self._refuse(f"images {images.shape} hold no pixels; write them again")
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            self._refuse(f"labels are {labels.dtype} {labels.shape}, expected integers [{len(images)}]; convert them")
        smallest, largest = int(labels.min()), int(labels.max())
        names = self._names(arrays["class_names"]) if "class_names" in arrays else None
        # a label may be huge, so nothing is allocated by it: without names there are at most as many classes as images
        present = np.unique(labels).tolist()
        count = largest + 1 if names is None else len(names)
        if smallest < 0 or largest >= count:
            self._refuse(f"labels lie in {smallest}..{largest}, outside 0..{count - 1}; correct them")
        if names is None and len(present) != count:
            missing = next(label for label, seen in enumerate(present) if label != seen)
            self._refuse(
                f"labels lie in {smallest}..{largest} but no image has label {missing}; number the classes from 0 "
                "without gaps, or name them all in class_names"
            )
        self.labels = labels.astype(np.int64)
        self.class_names = names if names is not None else tuple(str(label) for label in range(count))
        empty = sorted(set(range(count)) - set(present))
        some = ", ".join(f"'{shown(self.class_names[label])}'" for label in empty[:3])
        self.notes = (
            [f"{shown(path)}: {len(empty)} of {count} named classes have no images: {some}{', ...' * (len(empty) > 3)}"]
            if empty
            else []
        )
        digest = hashlib.sha256(repr((images.shape, self.class_names)).encode())
        digest.update(np.ascontiguousarray(images).data)
        digest.update(self.labels.tobytes())
        self.digest = digest.hexdigest()

    def read(self, index: int, size: int) -> np.ndarray:
        if self._images is None:  # in a worker: the arrays are read from the file, not sent
            self._images = self._load("images")["images"]
        image = self._images[index]
        if image.shape[:2] == (size, size):
            return np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image
        try:
            return center_crop(Image.fromarray(image), size)
        except DataError as error:
            raise DataError(f"{self.name(index)}: {error}") from None

    def name(self, index: int) -> str:
        return f"{shown(self.path)}, image {index}"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_images": None}

    def _refuse(self, message: str) -> NoReturn:
        raise DataError(f"{shown(self.path)}: {message}")

    def _names(self, names: np.ndarray) -> tuple[str, ...]:
        if names.ndim != 1 or names.dtype.kind not in "US" or not len(names):
            self._refuse(f"class_names are {names.dtype} {names.shape}, expected text [K]")
        try:
            texts = [item.decode() if isinstance(item, bytes) else item for item in names.tolist()]
        except UnicodeDecodeError:
            self._refuse("class_names are bytes that are not UTF-8; store them as text")
        for text in texts:
            check_utf8(text, f"{shown(self.path)}: class name")
        if len(set(texts)) != len(texts):
            twice = next(text for text in texts if texts.count(text) > 1)
            self._refuse(f"class_names hold '{shown(twice)}' twice; give each class a name of its own")
        return tuple(texts)

    def _load(self, *names: str) -> dict[str, np.ndarray]:
        """Those of the arrays that are there; nothing is allocated on the word of a header alone."""
        arrays = {}
        with reading(shown(self.path)):
            file = open(self.path, "rb")  # noqa: SIM115
        try:
            with file, zipfile.ZipFile(file) as archive:
                members = {member.filename: member for member in archive.infolist()}
                for name in names:
                    if archive.namelist().count(f"{name}.npy") > 1:
                        self._refuse(f"holds {name}.npy more than once; write it again with numpy.savez")
                    if f"{name}.npy" in members:
                        arrays[name] = self._array(archive, members[f"{name}.npy"])
        except DataError:
            raise
        except Exception as error:  # damaged archives raise many kinds
            raise DataError(
                f"{shown(self.path)}: not a readable npz ({reason(error)}); write it again with numpy.savez"
            ) from None
        return arrays

    def _array(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
        held = min(member.compress_size, self.path.stat().st_size)
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            self._refuse(f"{member.filename} is packed in another way than numpy does; write it with numpy.savez")
        if member.file_size > held * (MAX_DEFLATE if member.compress_type == zipfile.ZIP_DEFLATED else 1):
            self._refuse(f"{member.filename} claims {member.file_size} bytes in {held}; write it again")
        with archive.open(member) as stream:
            try:
                return read_npy(stream, member.file_size)  # at whose end the checksum is compared
            except ValueError as error:
                raise DataError(f"{shown(self.path)}: {member.filename} {error}; write it again") from None


def open_source(
    path: str | Path, *, out: Path | None = None, exif: bool = True, progress: bool = False
) -> FolderSource | ArraySource:
    """A folder of class folders (the options are for it), or an `.npz` file. Raises DataError for anything else."""
    location = Path(path)
    if not str(path):
        raise DataError("the source is an empty path; give a folder of class folders or an .npz file")
    try:
        if location.is_dir():
            return FolderSource(location, out=out, exif=exif, progress=progress)
        if location.suffix.lower() == ".npz" and location.is_file():
            return ArraySource(location)
        absent = not location.exists()
    except OSError as error:
        raise DataError(f"{shown(location)}: cannot be read ({reason(error)})") from None
    if absent:
        raise DataError(f"{shown(location)}: no such file or folder; give a folder of class folders or an .npz file")
    raise DataError(f"{shown(location)}: neither a folder of class folders nor an .npz file with images and labels")
