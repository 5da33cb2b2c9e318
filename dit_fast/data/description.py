"""`dataset.json`: what a folder of latent shards holds; every field is checked for its type and its range."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_fast.data.address import check_file_name, is_remote, join
from dit_fast.data.field import DTYPES, MOMENTS, RESERVED, Family, Field, ShardInfo
from dit_fast.data.json_object import MAX_VALUES, JsonObject
from dit_fast.data.shards import LABEL_MEMBER, MOMENTS_MEMBER
from dit_fast.errors import DataError

FORMAT = "dit_fast latent shards"
VERSION = 3  # of moments without a std; 1 declared no fields, but could hold images and features
WITH_STD = 2
FILE_NAME = "dataset.json"
Affine = float | tuple[float, ...]
# bounds, far from what anybody needs; what is beyond them is damage and would take memory until there is none
MAX_SAMPLES = 10**12
MAX_SHARD_SAMPLES = 1 << 24
MAX_CLASSES = 10**7
MAX_SIDE = 1 << 16
FIELD_NAME = re.compile(r"[a-z][a-z_]{0,63}")


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What a data set holds. Model-space latents are (mean + std * noise) * scale + shift.

    channels, size: latents are [channels, size, size]. std: whether each has a standard deviation beside its mean;
    without, moments are [1, channels, size, size]. scale, shift: one number or one per channel. dtype: of the
    stored moments. fields: what a batch can have besides moments and label, by name. autoencoder: what
    `load_autoencoder` takes ("" when unknown), autoencoder_config: what besides its weights decides the latents, where
    known. source: hash of the images and labels that it was made from, "" when unknown. statistics: mean and std per
    channel of sampled, unscaled latents, or None. shards: the tars with the latents. fingerprint: over all but the
    fields that were added in tars of their own, which have one each.
    """

    num_samples: int
    num_classes: int
    class_names: tuple[str, ...]
    channels: int
    size: int
    scale: Affine
    shift: Affine
    fields: Mapping[str, Field]
    dtype: str
    autoencoder: str
    autoencoder_identity: str
    autoencoder_config: dict[str, Any]
    source: str
    statistics: dict[str, list[float]] | None
    shards: tuple[ShardInfo, ...]
    fingerprint: str
    std: bool = True

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples per shard, in order: what `Plan` takes."""
        return tuple(shard.samples for shard in self.shards)

    @property
    def families(self) -> tuple[Family, ...]:
        """The shards first, then those of the fields that were added."""
        beside = {name: field for name, field in self.fields.items() if not field.shards}
        moments = Field(MOMENTS_MEMBER, (1 + self.std, self.channels, self.size, self.size), self.dtype)
        added: dict[tuple[ShardInfo, ...], dict[str, Field]] = {}
        for name, field in self.fields.items():
            if field.shards:
                added.setdefault(field.shards, {})[name] = field
        return (Family(self.shards, {MOMENTS: moments, **beside}), *(Family(*item) for item in added.items()))

    def field(self, name: str) -> Field:
        """What the samples' `name` is. Raises DataError with the fix where they have none."""
        if name not in self.fields:
            known = ", ".join(self.fields) or "none"
            made = name == "image" or name.startswith(("features", "class_token"))  # of the images, by `add-features`
            raise DataError(
                f"no field '{name}' in the shards (fields there: {known}); add it with "
                f"`dit-fast shards add-{'features' if made else 'field'} FOLDER {name}`, see docs/data.md"
            )
        return self.fields[name]

    def field_fingerprints(self, names: Iterable[str]) -> dict[str, str]:
        """The fingerprints of those of the fields that the data set's own does not cover: what else a run is bound to
        that reads them.
        """
        return {name: self.field(name).fingerprint for name in names if self.field(name).shards}


def fingerprint(description: Mapping[str, Any]) -> str:
    """sha256 over the canonical JSON of everything but itself, the place of the autoencoder, which may move, and the
    fields in tars of their own, so that adding one changes nothing for runs that do not read it.
    """
    content = {key: value for key, value in description.items() if key != "fingerprint"}
    if isinstance(content.get("autoencoder"), dict):
        content["autoencoder"] = {key: value for key, value in content["autoencoder"].items() if key != "spec"}
    fields = content.pop("fields", None)
    if isinstance(fields, dict):
        fields = {name: entry for name, entry in fields.items() if not _is_added(entry)}
    return _digest({**content, "fields": fields} if fields else content)


def description_bytes(description: Mapping[str, Any]) -> bytes:
    """The bytes of `dataset.json`, with the fingerprints filled in."""
    full = {**description, "fingerprint": fingerprint(description)}
    if isinstance(full.get("fields"), dict):
        full["fields"] = {
            name: {**entry, "fingerprint": _field_fingerprint(entry, full["fingerprint"])}
            if _is_added(entry)
            else entry
            for name, entry in full["fields"].items()
        }
    return (json.dumps(full, indent=1, ensure_ascii=True) + "\n").encode()


def _is_added(entry: object) -> bool:
    return isinstance(entry, dict) and "shards" in entry


def _field_fingerprint(entry: Mapping[str, Any], dataset: str) -> str:
    """Of a field in tars of its own, made for the data set with this fingerprint."""
    return _digest({**entry, "fingerprint": dataset})


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def field_entry(field: Field) -> dict[str, Any]:
    """A field as `dataset.json` declares it; one in tars of its own has "settings", "shards" and "fingerprint" too."""
    return {"member": field.member, "shape": list(field.shape), "dtype": field.dtype, "source": field.source}


def parse_description(data: bytes, where: str, root: str) -> DatasetInfo:
    """The description in the bytes of `dataset.json`. Raises DataError, one line naming file and field."""
    try:
        raw = json.loads(data)
        found = fingerprint(raw) if raw["format"] == FORMAT else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found = None
    if found is None:
        raise DataError(f"{where}: not a data set of dit_fast; make one with `dit-fast shards build`")
    given = JsonObject(raw, where)
    if raw.get("version") not in (1, WITH_STD, VERSION) or isinstance(raw["version"], bool):
        raise DataError(
            f"{where}: format version {json.dumps(raw.get('version'))[:20]}, this dit_fast reads 1 to {VERSION}; "
            "update dit_fast or rebuild"
        )
    if raw.get("fingerprint") != found:
        raise DataError(f"{where}: content does not match its fingerprint (edited or damaged); restore or rebuild it")
    channels, height, width = given.wholes("latent_shape", 3, MAX_SIDE)
    if height != width:
        raise DataError(f"{where}: latent_shape {raw['latent_shape']} is not square; rebuild with square images")
    num_classes, class_names = given.whole("num_classes", MAX_CLASSES), given.texts("class_names")
    if len(class_names) not in (0, num_classes):
        raise DataError(f"{where}: class_names has {len(class_names)} names, num_classes is {num_classes}; rebuild it")
    statistics = given.inner("statistics") if given.get("statistics") is not None else None
    autoencoder = given.inner("autoencoder")
    num_samples, shards = given.whole("num_samples", MAX_SAMPLES), _shards(given)
    if sum(shard.samples for shard in shards) != num_samples:
        raise DataError(
            f"{where}: shards hold {sum(shard.samples for shard in shards)} samples, num_samples is {num_samples}; "
            "rebuild it"
        )
    return DatasetInfo(
        num_samples=num_samples,
        num_classes=num_classes,
        class_names=class_names,
        channels=channels,
        size=height,
        scale=given.affine("scale", channels, 0),
        shift=given.affine("shift", channels),
        fields=_declared(given, shards, found),
        dtype=given.one_of("dtype", ("float16", "float32")),
        autoencoder=_beside(autoencoder.text("spec"), root),
        autoencoder_identity=autoencoder.text("identity"),
        autoencoder_config=_mapping(_mapping(raw.get("settings")).get("autoencoder_config")),
        source=str(_mapping(raw.get("settings")).get("source", "")),
        statistics={name: list(statistics.numbers(name, channels)) for name in ("mean", "std")} if statistics else None,
        shards=shards,
        fingerprint=found,
        std=raw["version"] != VERSION,
    )


def _shards(given: JsonObject) -> tuple[ShardInfo, ...]:
    """The table of the tars of one family."""
    shards = tuple(
        ShardInfo(
            name=check_file_name(shard.text("name"), given.where),
            samples=shard.whole("samples", MAX_SHARD_SAMPLES),
            bytes=shard.whole("bytes", 1 << 62),
            sha256=shard.text("sha256"),
        )
        for shard in given.objects("shards")
    )
    if not shards or len({shard.name for shard in shards if shard.name.endswith(".tar")}) != len(shards):
        raise DataError(
            f"{given.where}: {given.prefix}shards are not tars of different names; restore it or rebuild the data set"
        )
    return shards


def _declared(given: JsonObject, shards: tuple[ShardInfo, ...], dataset: str) -> dict[str, Field]:
    """The fields by name, checked. shards, dataset: the tars with the latents, and the data set's fingerprint."""
    raw = given.raw.get("fields", {}) if given.raw["version"] == 1 else given.get("fields")
    if not isinstance(raw, dict):
        given.refuse("fields", raw, "an object")
    if given.raw["version"] == 1:
        raw = {**_undeclared(given), **raw}
    found = {name: _field(name, JsonObject(entry, given.where, f"fields.{name}.")) for name, entry in raw.items()}
    for name, field in found.items():
        if field.shards and [shard.samples for shard in field.shards] != [shard.samples for shard in shards]:
            given.refuse(f"fields.{name}.shards", len(field.shards), "cut as the data set's shards are")
        if field.shards and field.fingerprint != _field_fingerprint(raw[name], dataset):
            raise DataError(
                f"{given.where}: fields.{name} does not match its fingerprint (edited, damaged, or made for another "
                "data set); restore it or add the field again"
            )
    names = [shard.name for table in {shards, *(field.shards for field in found.values())} for shard in table]
    beside = [MOMENTS_MEMBER, LABEL_MEMBER, *(field.member for field in found.values() if not field.shards)]
    if len(set(names)) != len(names) or len(set(beside)) != len(beside):
        given.refuse("fields", list(found), "of different members and shards")
    return found


def _field(name: str, given: JsonObject) -> Field:
    if not FIELD_NAME.fullmatch(name) or name in RESERVED:
        raise DataError(
            f"{given.where}: fields.{name[:70]!a} is no name of a field; restore it or rebuild the data set"
        )
    field = Field(
        member=given.one_of("member", (f"{name}.npy", "png", f"{name}.png")),
        shape=given.wholes("shape", None, MAX_VALUES),
        dtype=given.one_of("dtype", DTYPES),
        source=given.text("source"),
        shards=_shards(given) if "shards" in given.raw else (),
        fingerprint=given.text("fingerprint") if "shards" in given.raw else "",
    )
    if field.is_png and (
        field.dtype != "uint8" or field.shape != (3, *2 * field.shape[-1:]) or field.shape[1] > MAX_SIDE
    ):
        given.refuse("shape", [*field.shape, field.dtype], "that of a square image, [3, S, S] uint8")
    return field


def _undeclared(given: JsonObject) -> dict[str, Any]:
    """What version 1 says of images and features in members, image_size and features, as declared today."""
    members = given.texts("members")
    if not {MOMENTS_MEMBER, LABEL_MEMBER} <= set(members) <= {MOMENTS_MEMBER, LABEL_MEMBER, "png", "features.npy"}:
        given.refuse("members", list(members), f"{MOMENTS_MEMBER}, {LABEL_MEMBER} and perhaps png, features.npy")
    features = given.inner("features") if given.get("features") is not None else None
    if ("png" in members) == (given.get("image_size") is None) or ("features.npy" in members) == (features is None):
        given.refuse("members", list(members), "what image_size and features say")
    found = {}
    if "png" in members:
        found["image"] = field_entry(Field("png", (3, *2 * (given.whole("image_size", MAX_SIDE),)), "uint8"))
    if features is not None:
        shape = features.wholes("shape", 2, MAX_VALUES)
        found["features"] = field_entry(Field("features.npy", shape, "float16", features.text("encoder")))
    return found


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _beside(spec: str, root: str) -> str:
    """The autoencoder's spec with its place made out: `./` means beside the shards, on the server too."""
    kind, _, path = spec.partition(":")
    if not path.startswith("./"):
        return spec
    return f"{kind}:{join(root, path[2:]) if is_remote(root) else Path(root).resolve() / path[2:]}"
