"""Sources of labelled images: a folder (class = sorted folder name) or an array data set; the ADM centre crop."""

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from dit_fast.errors import DataError

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"}


class ImageSource(Protocol):
    """Labelled images by number. labels: int64 [N]. digest: changes when the source does, not when it is moved."""

    labels: np.ndarray
    class_names: tuple[str, ...]
    digest: str

    def read(self, index: int, size: int) -> np.ndarray:
        """uint8 [size, size, 3], cropped. Raises DataError naming the image."""
        ...


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The centre crop of ADM (guided-diffusion): uint8 [size, size, 3].

    Halves with a box filter while the shorter side is at least twice `size`, resizes the shorter side to `size`
    (bicubic), cuts the middle.
    """
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


class FolderSource:
    """Images in class folders, at any depth below them; classes and files in sorted order.

    Raises DataError when there is no class folder or no image.
    """

    def __init__(self, root: Path):
        folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        self.root = root
        self.class_names = tuple(folder.name for folder in folders)
        self.files: list[str] = []
        labels, digest = [], hashlib.sha256(repr(self.class_names).encode())
        for label, folder in enumerate(folders):
            files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
            for path in files:
                name = path.relative_to(root).as_posix()
                self.files.append(name)
                labels.append(label)
                digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        if not self.files:
            raise DataError(f"{root}: no images in class folders; expected {root}/CLASS/IMAGE.png (or jpg, webp, ...)")
        self.labels = np.array(labels, np.int64)
        self.digest = digest.hexdigest()

    def read(self, index: int, size: int) -> np.ndarray:
        path = self.root / self.files[index]
        try:
            with Image.open(path) as image:
                transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
                return center_crop(_on_white(image) if transparent else image, size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: not a readable image ({error}); replace or remove it") from None


class ArraySource:
    """An `.npz` with `images` uint8 [N, H, W] or [N, H, W, 3], `labels` int [N] and optionally `class_names` [K].

    Raises DataError naming the file and the array that is missing or has a wrong shape, dtype or value.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with np.load(path, allow_pickle=False) as archive:
                missing = [name for name in ("images", "labels") if name not in archive]
                if missing:
                    raise DataError(
                        f"{path}: has no array '{missing[0]}'; expected images [N, H, W(, 3)] and labels [N]"
                    )
                self._images: np.ndarray | None = archive["images"]
                labels = archive["labels"]
                names = archive["class_names"].tolist() if "class_names" in archive else None
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: not a readable npz without pickles ({error})") from None
        images = self._images
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
            raise DataError(
                f"{path}: images are {images.dtype} {images.shape}, expected uint8 [N, H, W] or [N, H, W, 3]"
            )
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or not len(labels):
            raise DataError(f"{path}: labels are {labels.dtype} {labels.shape}, expected integers [{len(images)}]")
        self.labels = labels.astype(np.int64)
        count = len(names) if names else int(labels.max()) + 1
        if int(labels.min()) < 0 or int(labels.max()) >= count:
            raise DataError(
                f"{path}: labels lie in {labels.min()}..{labels.max()}, outside 0..{count - 1}; correct them"
            )
        self.class_names = tuple(str(name) for name in names) if names else tuple(str(i) for i in range(count))
        digest = hashlib.sha256(repr((images.shape, self.class_names)).encode())
        digest.update(np.ascontiguousarray(images).data)
        digest.update(self.labels.tobytes())
        self.digest = digest.hexdigest()

    def read(self, index: int, size: int) -> np.ndarray:
        if self._images is None:  # in a worker: the arrays are read from the file, not sent
            with np.load(self.path, allow_pickle=False) as archive:
                self._images = archive["images"]
        image = self._images[index]
        if image.shape[:2] == (size, size):
            return np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image
        return center_crop(Image.fromarray(image), size)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_images": None}


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def open_source(path: str | Path) -> FolderSource | ArraySource:
    """A folder of class folders, or an `.npz` file. Raises DataError for anything else."""
    location = Path(path)
    if location.is_dir():
        return FolderSource(location)
    if location.suffix == ".npz" and location.is_file():
        return ArraySource(location)
    raise DataError(f"{location}: neither a folder of class folders nor an .npz file with images and labels")
