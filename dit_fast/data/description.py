"""`dataset.json`: what a folder of latent shards holds; every field is checked for its type and its range."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dit_fast.data.address import check_file_name, is_remote, join
from dit_fast.data.shards import FIELD_MEMBERS, LABEL_MEMBER, MOMENTS_MEMBER
from dit_fast.errors import DataError

FORMAT = "dit_fast latent shards"
VERSION = 1
FILE_NAME = "dataset.json"
Affine = float | tuple[float, ...]
# bounds, far from what anybody needs; what is beyond them is damage and would take memory until there is none
MAX_SAMPLES = 10**12
MAX_SHARD_SAMPLES = 1 << 24
MAX_CLASSES = 10**7
MAX_SIDE = 1 << 16
MAX_VALUES = 1 << 26  # of one array of one sample


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
    unknown), autoencoder_config: what besides its weights decides the latents, where known. feature_shape: (tokens,
    width) or None. image_size: pixels of the cropped image, or None. statistics: mean and std per channel of sampled,
    unscaled latents, or None.
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
    autoencoder_config: dict[str, Any]
    encoder: str
    feature_shape: tuple[int, int] | None
    statistics: dict[str, list[float]] | None
    shards: tuple[ShardInfo, ...]
    fingerprint: str

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples per shard, in order: what `Plan` takes."""
        return tuple(shard.samples for shard in self.shards)

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every `.npy` member of a sample."""
        found: dict[str, tuple[tuple[int, ...], str]] = {
            MOMENTS_MEMBER: ((2, self.channels, self.size, self.size), self.dtype)
        }
        if self.feature_shape is not None:
            found[FIELD_MEMBERS["features"]] = (self.feature_shape, "float16")
        return found


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


class _Fields:
    """A JSON object whose fields are taken by name, type and range. Raises DataError naming file and field."""

    def __init__(self, raw: Any, where: str, prefix: str = ""):
        self.where, self.prefix = where, prefix
        if not isinstance(raw, dict):
            self.refuse("", raw, "an object")
        self.raw: dict[str, Any] = raw

    def refuse(self, name: str, value: Any, wanted: str) -> NoReturn:
        field = f"{self.prefix}{name}".rstrip(".")
        shown = json.dumps(value)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        raise DataError(f"{self.where}: {field} is {shown}, not {wanted}; restore it or rebuild the data set")

    def get(self, name: str) -> Any:
        if name not in self.raw:
            raise DataError(f"{self.where}: lacks {self.prefix}{name}; restore it or rebuild the data set")
        return self.raw[name]

    def inner(self, name: str) -> "_Fields":
        return _Fields(self.get(name), self.where, f"{self.prefix}{name}.")

    def objects(self, name: str) -> list["_Fields"]:
        prefix = f"{self.prefix}{name}"
        return [_Fields(item, self.where, f"{prefix}[{i}].") for i, item in enumerate(self._list(name, "objects"))]

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            self.refuse(name, value, "a text")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._list(name, "texts")
        if not all(isinstance(item, str) for item in value):
            self.refuse(name, value, "a list of texts")
        return tuple(value)

    def one_of(self, name: str, valid: tuple[str, ...]) -> str:
        value = self.get(name)
        if not isinstance(value, str) or value not in valid:
            self.refuse(name, value, f"one of {', '.join(valid)}")
        return value

    def whole(self, name: str, high: int) -> int:
        return self._whole(name, self.get(name), high, f"a whole number in 1..{high}")

    def wholes(self, name: str, count: int, high: int) -> tuple[int, ...]:
        wanted = f"a list of {count} whole numbers in 1..{high}"
        value = self._list(name, f"{count} whole numbers")
        if len(value) != count:
            self.refuse(name, value, wanted)
        for item in value:
            self._whole(name, item, high, wanted)
        if math.prod(value) > MAX_VALUES:
            self.refuse(name, value, f"of at most {MAX_VALUES} values a sample")
        return tuple(value)

    def numbers(self, name: str, count: int, low: float = -math.inf) -> tuple[float, ...]:
        """`count` finite numbers above `low`."""
        value, above = self._list(name, f"{count} numbers"), "" if low == -math.inf else f" above {low:g}"
        if len(value) != count or not all(_finite(item) and item > low for item in value):
            self.refuse(name, value, f"a list of {count} finite numbers{above}, one per channel")
        return tuple(float(item) for item in value)

    def affine(self, name: str, count: int, low: float = -math.inf) -> Affine:
        """One finite number above `low`, or one per channel."""
        value = self.get(name)
        if isinstance(value, list):
            return self.numbers(name, count, low)
        if not _finite(value) or value <= low:
            self.refuse(name, value, f"a finite number{'' if low == -math.inf else f' above {low:g}'}")
        return float(value)

    def _list(self, name: str, of: str) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, list):
            self.refuse(name, value, f"a list of {of}")
        return value

    def _whole(self, name: str, value: Any, high: int, wanted: str) -> int:
        if type(value) is not int or not 1 <= value <= high:
            self.refuse(name, self.raw[name], wanted)
        return value


def _finite(value: Any) -> bool:
    """Whether a JSON value is a number that a float32 holds; true and false are not."""
    return type(value) in (int, float) and abs(value) <= 3.4e38


def parse_description(data: bytes, where: str, root: str) -> DatasetInfo:
    """The description in the bytes of `dataset.json`. Raises DataError, one line naming file and field."""
    try:
        raw = json.loads(data)
        found = fingerprint(raw) if raw["format"] == FORMAT else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found = None
    if found is None:
        raise DataError(f"{where}: not a data set of dit_fast; make one with `dit-fast shards build`")
    fields = _Fields(raw, where)
    if raw.get("version") != VERSION:
        raise DataError(
            f"{where}: format version {json.dumps(raw.get('version'))[:20]}, this dit_fast reads {VERSION}; "
            "update dit_fast or rebuild"
        )
    if raw.get("fingerprint") != found:
        raise DataError(f"{where}: content does not match its fingerprint (edited or damaged); restore or rebuild it")
    channels, height, width = fields.wholes("latent_shape", 3, MAX_SIDE)
    if height != width:
        raise DataError(f"{where}: latent_shape {raw['latent_shape']} is not square; rebuild with square images")
    num_classes, class_names = fields.whole("num_classes", MAX_CLASSES), fields.texts("class_names")
    if len(class_names) not in (0, num_classes):
        raise DataError(f"{where}: class_names has {len(class_names)} names, num_classes is {num_classes}; rebuild it")
    members = fields.texts("members")
    if not {MOMENTS_MEMBER, LABEL_MEMBER} <= set(members) <= set(FIELD_MEMBERS.values()):
        fields.refuse("members", list(members), f"{MOMENTS_MEMBER}, {LABEL_MEMBER} and perhaps png, features.npy")
    features = fields.inner("features") if fields.get("features") is not None else None
    statistics = fields.inner("statistics") if fields.get("statistics") is not None else None
    has_images, has_features = (FIELD_MEMBERS[name] in members for name in ("image", "features"))
    if has_images == (fields.get("image_size") is None) or has_features == (features is None):
        fields.refuse("members", list(members), "what image_size and features say")
    autoencoder = fields.inner("autoencoder")
    info = DatasetInfo(
        num_samples=fields.whole("num_samples", MAX_SAMPLES),
        num_classes=num_classes,
        class_names=class_names,
        channels=channels,
        size=height,
        scale=fields.affine("scale", channels, 0),
        shift=fields.affine("shift", channels),
        fields=tuple(name for name in ("image", "features") if FIELD_MEMBERS[name] in members),
        dtype=fields.one_of("dtype", ("float16", "float32")),
        image_size=fields.whole("image_size", MAX_SIDE) if has_images else None,
        autoencoder=_beside(autoencoder.text("spec"), root),
        autoencoder_identity=autoencoder.text("identity"),
        autoencoder_config=_mapping(_mapping(raw.get("settings")).get("autoencoder_config")),
        encoder=features.text("encoder") if features else "",
        feature_shape=features.wholes("shape", 2, MAX_VALUES) if features else None,  # type: ignore[arg-type]
        statistics={name: list(statistics.numbers(name, channels)) for name in ("mean", "std")} if statistics else None,
        shards=tuple(
            ShardInfo(
                name=check_file_name(shard.text("name"), where),
                samples=shard.whole("samples", MAX_SHARD_SAMPLES),
                bytes=shard.whole("bytes", 1 << 62),
                sha256=shard.text("sha256"),
            )
            for shard in fields.objects("shards")
        ),
        fingerprint=found,
    )
    names = {shard.name for shard in info.shards if shard.name.endswith(".tar")}
    if len(names) != len(info.shards):
        raise DataError(f"{where}: shards are not tars of different names; restore it or rebuild the data set")
    if not info.shards or sum(info.shard_sizes) != info.num_samples:
        raise DataError(
            f"{where}: shards hold {sum(info.shard_sizes)} samples, num_samples is {info.num_samples}; rebuild it"
        )
    return info


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _beside(spec: str, root: str) -> str:
    """The autoencoder's spec with its place made out: `./` means beside the shards, on the server too."""
    kind, _, path = spec.partition(":")
    if not path.startswith("./"):
        return spec
    return f"{kind}:{join(root, path[2:]) if is_remote(root) else Path(root).resolve() / path[2:]}"
