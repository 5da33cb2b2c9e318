"""`dataset.json`: what a folder of latent shards holds, and the checks made before a run starts."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_fast.data.address import check_address, check_file_name, is_remote, join, open_stream, read_bytes
from dit_fast.data.index import ShardIndex, index_from_bytes, index_name
from dit_fast.data.shards import FIELD_MEMBERS, MOMENTS_MEMBER, NpyParser, npy_bytes
from dit_fast.errors import DataError

if TYPE_CHECKING:
    from dit_fast.data.autoencoders import Autoencoder

FORMAT = "dit_fast latent shards"
VERSION = 1
FILE_NAME = "dataset.json"
Affine = float | tuple[float, ...]


@dataclass(frozen=True)
class ShardInfo:
    """One tar: file name, number of samples, bytes, sha256 of the file."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What a data set holds. Model-space latents are (mean + std * noise) * scale + shift.

    channels, size: latents are [channels, size, size]. scale, shift: one number or one per channel. fields: names a
    batch can have besides moments and label ("image", "features"). autoencoder: what `load_autoencoder` takes ("" when
    unknown). feature_shape: (tokens, width) or None. image_size: pixels of the cropped image, or None. statistics: mean
    and std per channel of sampled, unscaled latents, or None.
    """

    num_samples: int
    num_classes: int
    class_names: tuple[str, ...]
    channels: int
    size: int
    scale: Affine
    shift: Affine
    fields: tuple[str, ...]
    dtype: str
    image_size: int | None
    autoencoder: str
    autoencoder_identity: str
    encoder: str
    feature_shape: tuple[int, int] | None
    statistics: dict[str, list[float]] | None
    shards: tuple[ShardInfo, ...]
    fingerprint: str

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples per shard, in order: what `Plan` takes."""
        return tuple(shard.samples for shard in self.shards)


@dataclass(frozen=True)
class LatentDataset:
    """An opened data set: its description and every shard's index. Holds no open files; may be sent to workers."""

    root: str
    info: DatasetInfo
    indexes: tuple[ShardIndex, ...]

    def __len__(self) -> int:
        return self.info.num_samples

    @property
    def remote(self) -> bool:
        return is_remote(self.root)

    @property
    def labels(self) -> np.ndarray:
        """int64 [num_samples]."""
        return np.concatenate([index.label for index in self.indexes]).astype(np.int64)

    def require(self, fields: tuple[str, ...]) -> None:
        """Raises DataError when batches cannot have these fields."""
        for name in fields:
            if name not in self.info.fields:
                known = ", ".join(self.info.fields) or "none"
                option = {"image": "--store-images", "features": "--encoder"}.get(name)
                fix = f"; rebuild with `dit-fast shards build {option}`" if option else ""
                raise DataError(f"{self.root}: has no field '{name}' (extra fields here: {known}){fix}")

    def load_autoencoder(self) -> "Autoencoder":
        """The autoencoder the latents were made with. Raises DataError when it is unknown or another one lies there."""
        from dit_fast.data.autoencoders import load_autoencoder

        if not self.info.autoencoder:
            raise DataError(f"{self.root}: does not say where its autoencoder lies; give one, e.g. diffusers:DIR")
        autoencoder = load_autoencoder(self.info.autoencoder)
        if autoencoder.identity != self.info.autoencoder_identity:
            raise DataError(
                f"{self.info.autoencoder}: is {autoencoder.identity}, but the latents of {self.root} were made with "
                f"{self.info.autoencoder_identity}; restore that one"
            )
        return autoencoder


def fingerprint(description: Mapping[str, Any]) -> str:
    """sha256 over the canonical JSON of everything but itself and the place of the autoencoder, which may move."""
    content = {key: value for key, value in description.items() if key != "fingerprint"}
    if isinstance(content.get("autoencoder"), dict):
        content["autoencoder"] = {key: value for key, value in content["autoencoder"].items() if key != "spec"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def description_bytes(description: Mapping[str, Any]) -> bytes:
    """The bytes of `dataset.json`, with the fingerprint filled in."""
    full = {**description, "fingerprint": fingerprint(description)}
    return (json.dumps(full, indent=1, ensure_ascii=True) + "\n").encode()


def make_description(info: Mapping[str, Any], shards: list[ShardInfo]) -> dict[str, Any]:
    """`dataset.json` as a dictionary: format and version first, the shard table last."""
    samples = sum(shard.samples for shard in shards)
    table = [dataclasses.asdict(shard) for shard in shards]
    return {"format": FORMAT, "version": VERSION, "num_samples": samples, **info, "shards": table}


def _affine(value: Any) -> Affine:
    return tuple(float(item) for item in value) if isinstance(value, list) else float(value)


def _parse(data: bytes, where: str, root: str) -> DatasetInfo:
    try:
        raw = json.loads(data)
        if raw["format"] != FORMAT:
            raise KeyError("format")
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{where}: not a data set of dit_fast; make one with `dit-fast shards build`") from None
    if raw.get("version") != VERSION:
        raise DataError(
            f"{where}: format version {raw.get('version')}, this dit_fast reads {VERSION}; update dit_fast or rebuild"
        )
    if raw.get("fingerprint") != fingerprint(raw):
        raise DataError(f"{where}: content does not match its fingerprint (edited or damaged); restore or rebuild it")
    try:
        channels, height, width = raw["latent_shape"]
        features = raw["features"]
        spec = raw["autoencoder"]["spec"]
        kind, _, path = spec.partition(":")
        if path.startswith("./") and not is_remote(root):  # lies beside the shards
            spec = f"{kind}:{Path(root).resolve() / path[2:]}"
        info = DatasetInfo(
            num_samples=raw["num_samples"],
            num_classes=raw["num_classes"],
            class_names=tuple(raw["class_names"]),
            channels=channels,
            size=height,
            scale=_affine(raw["scale"]),
            shift=_affine(raw["shift"]),
            fields=tuple(name for name in ("image", "features") if FIELD_MEMBERS[name] in raw["members"]),
            dtype=raw["dtype"],
            image_size=raw["image_size"],
            autoencoder=spec,
            autoencoder_identity=raw["autoencoder"]["identity"],
            encoder=features["encoder"] if features else "",
            feature_shape=(features["shape"][0], features["shape"][1]) if features else None,
            statistics=raw["statistics"],
            shards=tuple(ShardInfo(**shard) for shard in raw["shards"]),
            fingerprint=raw["fingerprint"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: lacks or misspells {error}; rebuild with `dit-fast shards build`") from None
    if height != width:
        raise DataError(f"{where}: latent_shape {raw['latent_shape']} is not square; rebuild with square images")
    for shard in info.shards:
        check_file_name(shard.name, where)
    if sum(info.shard_sizes) != info.num_samples or min(info.shard_sizes, default=0) < 1:
        raise DataError(
            f"{where}: shards hold {sum(info.shard_sizes)} samples, num_samples is {info.num_samples}; rebuild it"
        )
    return info


def open_dataset(path_or_url: str | Path) -> LatentDataset:
    """Reads `dataset.json` and all indexes of a folder or http(s) address and checks them against the tars.

    Checked here: every shard is present (local folders), has the bytes the description names, agrees with its index in
    samples, keys and extent; every moments member has the expected size, and the first of each shard the expected shape
    and dtype; labels lie in [0, num_classes). Payload checksums are checked when samples are read.

    Raises DataError, one line naming the file and the fix.
    """
    root = check_address(str(path_or_url))
    if not is_remote(root) and not Path(root).is_dir():
        raise DataError(f"{root}: no such folder; make the data set with `dit-fast shards build SOURCE {root}`")
    where = join(root, FILE_NAME)
    if not is_remote(root) and not Path(where).is_file():
        raise DataError(f"{where}: missing; finish the data set with `dit-fast shards build SOURCE {root}`")
    info = _parse(read_bytes(where), where, root)
    indexes, first_key = [], 0
    for shard in info.shards:
        indexes.append(_open_index(root, shard, info, first_key))
        first_key += shard.samples
    return LatentDataset(root=root, info=info, indexes=tuple(indexes))


def _open_index(root: str, shard: ShardInfo, info: DatasetInfo, first_key: int) -> ShardIndex:
    tar, idx = join(root, shard.name), join(root, index_name(shard.name))
    reindex = f"rebuild it with `dit-fast shards index {root}`"
    if not is_remote(root):
        if not Path(tar).is_file():
            raise DataError(f"{tar}: shard is missing; restore it or rebuild with `dit-fast shards build`")
        size = Path(tar).stat().st_size
        if size != shard.bytes:
            raise DataError(f"{tar}: has {size} bytes where dataset.json says {shard.bytes}; restore it or rebuild it")
        if not Path(idx).is_file():
            raise DataError(f"{idx}: index is missing; {reindex}")
    index = index_from_bytes(read_bytes(idx), idx)
    if index.first_key != first_key or len(index) != shard.samples or index.tar_bytes != shard.bytes:
        raise DataError(
            f"{idx}: describes samples {index.first_key}..{index.first_key + len(index)} of a tar of {index.tar_bytes} "
            f"bytes, dataset.json says {first_key}..{first_key + shard.samples} of {shard.bytes}; {reindex}"
        )
    wanted = {MOMENTS_MEMBER, FIELD_MEMBERS["label"], *(FIELD_MEMBERS[name] for name in info.fields)}
    if set(index.members) != wanted:
        raise DataError(
            f"{idx}: members {sorted(index.members)} differ from dataset.json's {sorted(wanted)}; {reindex}"
        )
    if int((index.offset + index.length).max()) > index.tar_bytes:
        raise DataError(f"{idx}: points behind the end of {shard.name}; {reindex}")
    bad = np.flatnonzero((index.label < 0) | (index.label >= info.num_classes))
    if len(bad):
        raise DataError(
            f"{tar}: sample {first_key + int(bad[0]):09d} has label {int(index.label[bad[0]])}, outside "
            f"0..{info.num_classes - 1} ({len(bad)} such samples); correct the labels and rebuild the shard"
        )
    _check_shapes(tar, index, info)
    return index


def _check_shapes(tar: str, index: ShardIndex, info: DatasetInfo) -> None:
    """All members by their length, the first by its header too."""
    expected: dict[str, tuple[tuple[int, ...], str]] = {
        MOMENTS_MEMBER: ((2, info.channels, info.size, info.size), info.dtype)
    }
    if info.feature_shape:
        expected[FIELD_MEMBERS["features"]] = (info.feature_shape, "float16")
    for member, (shape, dtype) in expected.items():
        lengths = index.length[:, index.members.index(member)]
        wrong = np.flatnonzero(lengths != len(npy_bytes(np.zeros(shape, dtype))))
        row = int(wrong[0]) if len(wrong) else 0
        name = f"{tar}: sample {index.first_key + row:09d}"
        should = f"where dataset.json says {shape} {dtype}; rebuild the shard"
        if is_remote(tar):
            if len(wrong):
                raise DataError(f"{name} has {member} of {int(lengths[row])} bytes {should}")
            continue
        with open_stream(tar) as stream:
            stream.seek(int(index.offset[row, index.members.index(member)]))
            found = NpyParser()(stream.read(int(lengths[row])), f"{name}: {member}")
        if found.shape != shape or found.dtype != np.dtype(dtype):
            raise DataError(f"{name} has {member} {found.shape} {found.dtype} {should}")
