"""Fields in tars of their own: added to finished shards, read by every reader, and bound to the runs that read them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dit_fast.data import Plan, add_field, build_loader, open_dataset
from dit_fast.data.index import index_from_bytes, index_to_bytes
from dit_fast.errors import CheckpointError, UserError
from dit_fast.files import remove_tree
from dit_fast.options import to_dict
from dit_fast.preparation.verify import rebuild_index, verify_dataset
from dit_fast.train.prepare import check_resume
from tests.helpers.cases import refused
from tests.helpers.damage import attack, flip, replace_member
from tests.helpers.http_server import serving
from tests.helpers.shard_sets import COUNT, contents, everything, full_after, rewrite

TOKENS = np.arange(COUNT * 6, dtype=np.int32).reshape(COUNT, 3, 2)
BRIGHTNESS = np.linspace(-1, 1, COUNT).astype(np.float32)


@pytest.fixture(scope="session")
def arrays(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arrays")
    np.save(folder / "tokens.npy", TOKENS)
    np.save(folder / "brightness.npy", BRIGHTNESS)
    return folder


@pytest.fixture(scope="session")
def extended(built, arrays, tmp_path_factory):
    """Shards with two added fields; tests that damage them work on a copy."""
    folder = shutil.copytree(built, tmp_path_factory.mktemp("extended") / "shards")
    for name in ("tokens", "brightness"):
        add_field(folder, name, arrays / f"{name}.npy", progress=False)
    return folder


@pytest.fixture
def bare(built, tmp_path):
    return shutil.copytree(built, tmp_path / "bare")


@pytest.fixture
def copied(extended, tmp_path):
    return shutil.copytree(extended, tmp_path / "copy")


def loader(folder, *fields, start=0, **options):
    dataset = open_dataset(folder)
    sizes = {"global_batch": 8, "micro_batch": 8, "rank": 0, "world_size": 1, "start": start}
    return build_loader(dataset, Plan(dataset.info.shard_sizes, 5, 2), fields=fields, **sizes, **options)


def test_no_file_that_was_there_changes_nor_any_run_that_does_not_read_it(built, extended):
    before, after = contents(built), contents(extended)
    tars = {f"{name}-{shard:06d}" for name in ("tokens", "brightness") for shard in range(6)}
    assert after.keys() - before.keys() == {f"{name}.{kind}" for name in tars for kind in ("tar", "idx")}
    assert all(after[name] == data for name, data in before.items() if name != "dataset.json")
    assert open_dataset(built).info.fingerprint == open_dataset(extended).info.fingerprint
    verify_dataset(extended)
    rebuild_index(extended / "tokens-000002.tar")
    assert contents(extended) == after


def test_shards_of_before_fields_were_declared_take_them_too(tmp_path):
    folder = shutil.copytree(Path(__file__).parent / "before_seams" / "shards", tmp_path / "before")
    before = open_dataset(folder).info
    np.save(tmp_path / "x.npy", np.arange(24, dtype=np.float16))
    info = add_field(folder, "x", tmp_path / "x.npy", progress=False).info
    assert info.fingerprint == before.fingerprint
    assert {name: field for name, field in info.fields.items() if name != "x"} == before.fields
    assert everything(folder, ("x", "features"))["x"].tolist() == list(range(24))
    verify_dataset(folder)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("reader", ["python", "indexed", "stream"])
def test_every_reader_gives_them_in_the_order_of_the_plan(built, extended, reader, num_workers, monkeypatch):
    if reader == "python":
        monkeypatch.setattr("dit_fast._C.host", lambda: None)
    options = {"reader": "stream" if reader == "stream" else "indexed", "num_workers": num_workers}
    batches = loader(extended, "tokens", "image", "brightness", start=16, **options)
    order = Plan(open_dataset(built).info.shard_sizes, 5, 2).indices(16, 64).reshape(-1, 8)
    for samples, without in zip(order, loader(built, "image", start=16), strict=False):
        batch = next(batches)
        assert list(batch) == ["moments", "label", "position", "tokens", "image", "brightness"]
        assert all(torch.equal(batch[name], without[name]) for name in without)
        assert torch.equal(batch["tokens"], torch.from_numpy(TOKENS[samples]))
        assert torch.equal(batch["brightness"], torch.from_numpy(BRIGHTNESS[samples]))
    batches.close()


def test_they_are_streamed_over_http(extended):
    with serving(extended) as server:
        batch, other = next(loader(server.address, "tokens")), next(loader(extended, "tokens"))
        assert all(torch.equal(batch[name], other[name]) for name in other)
        assert "local data sets only" in refused(add_field, server.address, "x", "x.npy")


@pytest.mark.parametrize("reader", ["indexed", "stream"])
def test_only_the_families_that_are_asked_for_are_opened(copied, arrays, reader):
    (copied / "tokens-000003.tar").unlink()
    next(loader(copied, "brightness", reader=reader))
    assert "tokens-000003.tar: shard is missing" in refused(loader, copied, "tokens", reader=reader)
    again = refused(add_field, copied, "tokens", arrays / "tokens.npy", progress=False)
    assert "tokens-000003.tar: shard is missing" in again


def test_a_run_that_has_the_data_set_open_is_not_disturbed(built, bare, arrays):
    batches = loader(bare, num_workers=1)
    taken = [next(batches)]
    add_field(bare, "brightness", arrays / "brightness.npy", progress=False)
    taken += [next(batches) for _ in range(11)]
    batches.close()
    for batch, other in zip(taken, loader(built), strict=False):
        assert torch.equal(batch["moments"], other["moments"])


def test_bytes_depend_neither_on_processes_nor_on_interruptions(bare, extended, arrays, tmp_path, monkeypatch):
    before = contents(bare)
    with monkeypatch.context() as patch:
        full_after(patch, 41)
        message = refused(add_field, bare, "tokens", arrays / "tokens.npy", progress=False)
    assert "no space left" in message
    assert "2 finished shards are kept" in message
    assert contents(bare).items() >= before.items()  # and nobody sees what is there of the new one
    assert list(open_dataset(bare).info.fields) == ["image"]
    np.save(tmp_path / "other.npy", TOKENS + 1)
    assert "begun with other settings" in refused(add_field, bare, "tokens", tmp_path / "other.npy", progress=False)
    times = {path.name: path.stat().st_mtime_ns for path in bare.glob("tokens-*.tar")}
    assert len(times) == 2
    for _ in range(2):  # the second call finds itself done
        add_field(bare, "tokens", arrays / "tokens.npy", processes=2, progress=False)
    assert times.items() <= {path.name: path.stat().st_mtime_ns for path in bare.glob("tokens-*.tar")}.items()
    add_field(bare, "brightness", arrays / "brightness.npy", progress=False)
    assert contents(bare) == contents(extended)


@pytest.mark.parametrize(
    ("array", "dtype", "message"),
    [
        (TOKENS[1:], None, "x.npy: holds 42 rows, .* has 43 samples"),
        (BRIGHTNESS.astype(np.float64), None, "is float64; valid are float16, .*give --dtype float16"),
        (np.full(COUNT, "a"), None, "is str.*; convert it"),
        (np.float32(1), None, r"is an array \(\)"),
        (np.zeros((COUNT, 0), np.float32), None, r"is an array \(43, 0\)"),
        (TOKENS, "float16", "dtype 'float16' for an array of int32"),
        (
            np.where(np.arange(COUNT) == 20, np.float32(np.nan), BRIGHTNESS),
            None,
            r"x-000002.tar: sample 000000020 \(.*x.npy, row 20\) has values of field 'x' that are NaN",
        ),
        (BRIGHTNESS * 1e6, "float16", "that are not finite in float16; store it as float32"),
    ],
    ids=["count", "float64", "text", "number", "empty", "converted", "nan", "range"],
)
def test_values_that_cannot_be_added_are_one_line(bare, tmp_path, array, dtype, message):
    before = contents(bare)
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(UserError, match=message) as caught:
        add_field(bare, "x", tmp_path / "x.npy", dtype=dtype, progress=False)
    assert "\n" not in str(caught.value)
    assert contents(bare).items() >= before.items()


def test_names_and_files_that_cannot_be_added_are_one_line(extended, arrays, tmp_path):
    before = contents(extended)
    (tmp_path / "junk.npy").write_bytes(b"junk")
    for name, file, message in (
        *((name, "tokens", "is no name for a field") for name in ("Tokens", "a-b", "label", "shard", "", "../x", "_")),
        ("image", "tokens", "has a field 'image' already, beside the latents"),
        ("brightness", "tokens", "has a field 'brightness' already (fields.brightness.shape: [] -> [3, 2]"),
        ("junk", tmp_path / "junk", "not an .npy array"),
        ("absent", "absent", "absent.npy: cannot be read"),
    ):
        assert message in refused(add_field, extended, name, arrays / f"{file}.npy", progress=False)
    assert contents(extended) == before


def test_a_corrected_array_is_told_what_to_delete_and_it_is_not_the_data_set(bare, tmp_path):
    np.save(tmp_path / "x.npy", np.where(np.arange(COUNT) == 20, np.float32(np.nan), BRIGHTNESS))
    refused(add_field, bare, "x", tmp_path / "x.npy", progress=False)
    np.save(tmp_path / "x.npy", BRIGHTNESS)
    line = refused(add_field, bare, "x", tmp_path / "x.npy", progress=False)
    assert line.endswith("; use those, another name, or delete .build-x and x-*.tar there")
    for path in (*bare.glob("x-*.tar"), bare / ".build-x"):
        remove_tree(path)
    add_field(bare, "x", tmp_path / "x.npy", progress=False)


def test_a_field_of_images_holds_images(shards, tmp_path):
    """Encoders and reports read it as such."""
    folder = shutil.copytree(shards, tmp_path / "shards")
    np.save(tmp_path / "x.npy", np.zeros((48, 3, 16, 8), np.uint8))
    line = refused(add_field, folder, "image", tmp_path / "x.npy", progress=False)
    assert "a field 'image' holds pictures, uint8 [3, S, S], not uint8 [3, 16, 8]" in line
    np.save(tmp_path / "x.npy", np.zeros((48, 3, 16, 16), np.uint8))
    assert "image" in add_field(folder, "image", tmp_path / "x.npy", progress=False).info.fields


def test_a_run_is_bound_to_the_added_fields_that_it_reads(bare, extended, tmp_path):
    from dit_fast.runs import TrainConfig

    info = open_dataset(extended).info
    bound = info.field_fingerprints(("image", "tokens"))
    assert list(bound) == ["tokens"]
    np.save(tmp_path / "tokens.npy", TOKENS + 1)
    other = add_field(bare, "tokens", tmp_path / "tokens.npy", progress=False).info
    state = {"config": to_dict(TrainConfig()), "dataset_fingerprint": info.fingerprint}
    check_resume(SimpleNamespace(path="run", state=state), TrainConfig(), other, (), {})  # also a run of before
    checkpoint = SimpleNamespace(path="run", state={**state, "field_fingerprints": bound})
    check_resume(checkpoint, TrainConfig(), info, ("image", "tokens"), {})
    with pytest.raises(CheckpointError, match="field 'tokens' is another one than run was trained with"):
        check_resume(checkpoint, TrainConfig(), other, ("image", "tokens"), {})


def test_random_damage_gives_the_right_samples_or_one_line(extended, tmp_path):
    assert attack(extended, tmp_path, range(1000, 1012)) == []


DAMAGE = {
    "shifted keys": "tokens-000001.idx: describes samples 9..17",
    "bytes": "tokens-000001.tar: 000000010.tokens.npy is corrupt",
    "nan": "brightness-000001.tar: 000000008.brightness.npy holds NaN or Inf",
    "dtype": "tokens-000001.tar: 000000008.tokens.npy is (3, 2) '<u4' where dataset.json says (3, 2) int32",
    "cut otherwise": "fields.tokens.shards is 5, not cut as the data set's shards are",
    "declared": "fields.tokens does not match its fingerprint (edited, damaged, or made for another data set)",
}


def spoil(folder, kind):
    tar, idx, description = (folder / name for name in ("tokens-000001.tar", "tokens-000001.idx", "dataset.json"))
    if kind == "shifted keys":
        index = index_from_bytes(idx.read_bytes(), "")
        idx.write_bytes(index_to_bytes(replace(index, first_key=index.first_key + 1)))
    elif kind == "bytes":
        flip(tar, 8 * (2 * 1024 + 512 + 140))  # row 2, its values
    elif kind == "nan":
        tar = folder / "brightness-000001.tar"
        replace_member(folder, tar, 0, 0, tar.read_bytes()[512 : 512 + 128] + np.float32(np.nan).tobytes())
    elif kind == "dtype":
        replace_member(folder, tar, 0, 0, tar.read_bytes()[512 : 512 + 152].replace(b"<i4", b"<u4"))
    elif kind == "cut otherwise":
        rewrite(folder, lambda content: content["fields"]["tokens"]["shards"].pop())
    else:
        content = json.loads(description.read_bytes())
        content["fields"]["tokens"]["source"] = "somewhere else"
        description.write_text(json.dumps(content))


@pytest.mark.parametrize("reader", ["indexed", "stream"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_a_family_is_named(copied, kind, reader):
    spoil(copied, kind)

    def read():
        batches = loader(copied, "tokens", "brightness", reader=reader)
        for _ in range(6):
            next(batches)

    assert DAMAGE[kind] in refused(read)
    assert {"bytes": "sha256 differs"}.get(kind, DAMAGE[kind]) in refused(verify_dataset, copied)
