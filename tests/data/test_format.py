"""The files: deterministic, rebuildable, readable by others, and every damage found."""

import hashlib
import io
import json
import re
import tarfile

import numpy as np
import pytest

from dit_fast import autoencoders
from dit_fast.data import open_dataset
from dit_fast.data.field import Field
from dit_fast.data.index import index_from_bytes, index_to_bytes
from dit_fast.data.reader import IndexedReader
from dit_fast.data.shards import npy_bytes, parse_npy, scan_tar
from dit_fast.errors import DataError
from dit_fast.preparation.verify import rebuild_index, verify_dataset
from tests.helpers.cases import refused
from tests.helpers.shard_sets import COUNT, make_images, rewrite


def test_tar_is_plain(built):
    with tarfile.open(built / "shard-000001.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:4]] == [
        "000000008.moments.npy", "000000008.cls", "000000008.png", "000000009.moments.npy",
    ]  # fmt: skip
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "root", "root", 0o644)}


def test_dataset_json_tells_everything(built):
    info = open_dataset(built).info
    assert (info.num_samples, info.num_classes, info.class_names) == (COUNT, 3, ("ant", "bee", "cat"))
    assert (info.channels, info.size, info.fields) == (12, 4, {"image": Field("png", (3, 16, 16), "uint8")})
    assert info.shard_sizes == (8, 8, 8, 8, 8, 3)
    assert info.autoencoder == f"pca:{built.resolve()}/autoencoder.safetensors"
    for shard in info.shards:
        data = (built / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_samples_hold_what_was_encoded(array_file, built):
    dataset = open_dataset(built)
    images, labels = make_images()
    batch = IndexedReader(dataset, ("image",)).read(np.arange(COUNT), np.arange(COUNT))
    order = [
        int(np.flatnonzero((images.transpose(0, 3, 1, 2) == image.numpy()).all((1, 2, 3)))[0])
        for image in batch["image"]
    ]
    assert sorted(order) == list(range(COUNT))
    assert order != sorted(order)  # shuffled when written
    assert batch["label"].tolist() == labels[order].tolist()
    mean, std = autoencoders.of(dataset).encode(batch["image"].float() / 127.5 - 1)
    np.testing.assert_allclose(batch["moments"][:, 0].numpy(), mean.numpy(), rtol=2e-3, atol=2e-3)
    assert not std.any()
    assert not batch["moments"][:, 1].any()
    assert dataset.labels.tolist() == labels[order].tolist()


def test_statistics_are_those_of_the_latents(built):
    dataset = open_dataset(built)
    latents = IndexedReader(dataset).read(np.arange(COUNT), np.arange(COUNT))["moments"][:, 0]
    statistics = dataset.info.statistics
    np.testing.assert_allclose(statistics["mean"], latents.mean((0, 2, 3)), atol=2e-3)
    np.testing.assert_allclose(statistics["std"], latents.std((0, 2, 3), correction=0), rtol=2e-3, atol=1e-3)


def test_index_round_trip_and_rebuild(copied):
    for tar in sorted(copied.glob("*.tar")):
        idx = tar.with_suffix(".idx")
        before = idx.read_bytes()
        assert index_to_bytes(index_from_bytes(before, "x")) == before
        idx.unlink()
        rebuild_index(tar)
        assert idx.read_bytes() == before
    verify_dataset(copied)


@pytest.mark.parametrize("damage", ["header", "between members", "end mark", "inside"])
def test_no_index_is_made_of_a_damaged_tar(copied, damage):
    path = copied / "shard-000001.tar"
    index = open_dataset(copied).indexes[1]
    data = bytearray(path.read_bytes())
    header = int(index.offset[3, 0]) - 512
    if damage == "header":
        data[header + 150] ^= 1
    else:
        del data[{"between members": header, "end mark": len(data) - 600, "inside": header + 700}[damage] :]
    path.write_bytes(data)
    assert re.search(r"shard-000001.tar: .*(damaged|cut short)", refused(scan_tar, path))


def test_any_webdataset_user_can_stream_it(built):
    wds = pytest.importorskip("webdataset")
    urls = str(built / "shard-{000000..000005}.tar")
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode(wds.handle_extension("moments.npy", np_load)))
    reader = IndexedReader(open_dataset(built)).read(np.arange(COUNT), np.arange(COUNT))
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(COUNT)]
    assert [int(sample["cls"]) for sample in samples] == reader["label"].tolist()
    assert np.array_equal(np.stack([sample["moments.npy"] for sample in samples]), reader["moments"].half().numpy())


def np_load(data):
    return np.load(io.BytesIO(data), allow_pickle=False)


@pytest.mark.parametrize("seed", range(40))
def test_every_flip_and_cut_is_found(copied, seed):
    rng = np.random.default_rng(seed)
    files = [path for path in sorted(copied.iterdir()) if path.suffix in (".tar", ".idx", ".json")]
    path = files[rng.integers(len(files))] if seed % 4 == 0 else copied / f"shard-{rng.integers(6):06d}.tar"
    data = bytearray(path.read_bytes())
    if seed % 3 == 0:
        del data[rng.integers(len(data)) :]
    else:
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        verify_dataset(copied)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reading_unchecked_gives_the_damaged_values(copied):
    dataset = open_dataset(copied)
    index = dataset.indexes[0]
    path = copied / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[int(index.offset[1, 0] + index.length[1, 0]) - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-000000.tar: 000000001.moments.npy is corrupt"):
        IndexedReader(dataset).read(np.arange(3), np.arange(3))
    IndexedReader(dataset, check_crc=False).read(np.arange(3), np.arange(3))


def test_bad_data_sets_are_refused_at_once(copied):
    def is_refused(message):
        assert re.search(message, refused(open_dataset, copied))

    original = (copied / "dataset.json").read_bytes()
    rewrite(copied, lambda content: content.update(num_classes=2, class_names=[]))
    is_refused(r"shard-\d+.tar: sample \d+ has label 2, outside 0..1")
    (copied / "dataset.json").write_bytes(original)
    rewrite(copied, lambda content: content.update(latent_shape=[12, 8, 8]))
    is_refused(r"000000000.moments.npy has \d+ bytes where dataset.json allows 3073..")
    (copied / "dataset.json").write_bytes(original)
    rewrite(
        copied, lambda content: content.update(latent_shape=[48, 2, 2], scale=1.0, statistics=None)
    )  # as many bytes
    is_refused(r"moments.npy is \(2, 12, 4, 4\) '<f2' where dataset.json says \(2, 48, 2, 2\)")
    (copied / "dataset.json").write_bytes(original)
    rewrite(copied, lambda content: content["shards"][1].update(name="../shard-000001.tar"))
    is_refused("not a plain file name")
    (copied / "dataset.json").write_bytes(original)
    rewrite(copied, lambda content: content.update(version=7))
    is_refused("format version 7")
    (copied / "dataset.json").write_bytes(original.replace(b'"bee"', b'"bug"'))
    is_refused("does not match its fingerprint")
    (copied / "dataset.json").write_bytes(original)
    tar = (copied / "shard-000004.tar").read_bytes()
    (copied / "shard-000004.tar").write_bytes(tar[:-512])
    is_refused(rf"shard-000004.tar: has {len(tar) - 512} bytes where dataset.json says {len(tar)}; restore it")
    (copied / "shard-000004.tar").write_bytes(tar)
    (copied / "shard-000002.idx").write_bytes((copied / "shard-000001.idx").read_bytes())
    is_refused("shard-000002.idx: describes samples 8..16.*dit-fast shards index")
    (copied / "shard-000002.idx").unlink()
    is_refused("shard-000002.idx: index is missing; rebuild it with `dit-fast shards index")
    (copied / "shard-000002.tar").unlink()
    is_refused("shard-000002.tar: shard is missing; restore it or build")
    (copied / "dataset.json").unlink()
    is_refused("dataset.json: missing; finish the data set with `dit-fast shards build")


def test_the_place_of_the_autoencoder_may_be_edited(copied):
    path = copied / "dataset.json"
    content = json.loads(path.read_bytes())
    content["autoencoder"]["spec"] = "pca:/elsewhere/a.safetensors"
    path.write_text(json.dumps(content))
    assert open_dataset(copied).info.autoencoder == "pca:/elsewhere/a.safetensors"


def test_another_autoencoder_in_its_place_is_refused(copied):
    from dit_fast.autoencoders.patch_pca import PatchPCA

    PatchPCA.fit(make_images(seed=3)[0]).save(copied / "autoencoder.safetensors")
    with pytest.raises(DataError, match="but the latents of"):
        autoencoders.of(open_dataset(copied))


@pytest.mark.parametrize("address", ["pipe:cat x", "exec:ls", "simplecache::http://h/x", "ftp://host/x"])
def test_addresses_that_start_programs_are_refused(address):
    with pytest.raises(DataError, match="only folders, http"):
        open_dataset(address)


def test_no_pickles_in_npy():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"x is \(1,\) '|O' where dataset.json says"):
        parse_npy(buffer.getvalue(), (1,), "float16", "x")
    with pytest.raises(DataError, match="do not fit"):
        parse_npy(npy_bytes(np.zeros((2, 3)))[:-1], (2, 3), "float64", "x")
    for junk in (b"", b"nonsense", npy_bytes(np.zeros(3)).replace(b"(3,)", b"(-3)")):
        with pytest.raises(DataError, match="x is not a readable npy"):
            parse_npy(junk, (3,), "float64", "x")
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    assert np.array_equal(parse_npy(npy_bytes(array), (2, 3), "float16", "x"), array)
