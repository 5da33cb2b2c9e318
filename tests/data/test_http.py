"""Shards over http: what breaks on the way is asked for again; what is wrong is one line, at once."""

import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from dit_fast import autoencoders
from dit_fast.data import Plan, build_loader, open_dataset, remote
from dit_fast.data.address import check_address, join
from dit_fast.data.cache import ShardCache
from dit_fast.data.reader import IndexedReader
from dit_fast.errors import ConfigError, DataError
from tests.helpers.damage import flip, read
from tests.helpers.http_server import serving
from tests.helpers.shard_sets import COUNT, rewrite

TARS = 6


@pytest.fixture
def server(built, monkeypatch):
    pauses = []
    monkeypatch.setattr(remote, "pause", lambda seconds=0.0: pauses.append(seconds) if seconds else None)
    with serving(built) as server:
        server.pauses = pauses
        yield server
        server.hurry.set()


def same(ours, theirs):
    return all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def epoch(address, cache, rank=0, world_size=1, start=0, **options):
    """Positions and moments of a rank's share of an epoch, from `start` on."""
    dataset = open_dataset(address)
    sizes = {"global_batch": 4, "micro_batch": 4 // world_size, "rank": rank, "world_size": world_size, "start": start}
    loader = build_loader(dataset, Plan(dataset.info.shard_sizes, 0, 2), **sizes, cache=cache, **options)
    batches = [next(loader) for _ in range((COUNT - start) // 4)]
    loader.close()
    return {name: torch.cat([batch[name] for batch in batches]) for name in ("position", "moments")}


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_answers_are_asked_for_again_from_where_they_broke(server, built, caplog, ranges, monkeypatch):
    monkeypatch.setattr("dit_fast.data.cache.PART_BYTES", 1 << 14)
    server.ranges = ranges
    server.faults = {
        "dataset.json": [503, "cut"],
        "shard-000000.idx": [429],
        "shard-000001.tar": ["cut", 500, "cut", "cut"],
        "shard-000004.tar": [502, "cut"],
    }
    with caplog.at_level("WARNING", logger="dit_fast"):
        assert same(read(server.address, "stream"), read(built, "stream"))
    assert not any(server.faults.values())
    assert len(caplog.records) == len(server.pauses) == 9  # each retry once
    assert "retry 1 of" in caplog.text
    assert server.pauses[0] == 7  # Retry-After of an answer that has one
    assert all(low <= pause <= 1.25 * low for low, pause in zip((7, 1.0), server.pauses[:2], strict=True))
    if ranges:
        spans = [span for name, span in server.asked if name == "shard-000001.tar"]
        assert spans[:6] == ["bytes=0-16383"] * 5 + ["bytes=16384-32767"]  # a part again, not the whole


def test_a_store_that_dies_and_comes_back_is_outlasted(server, built, tmp_path, caplog, monkeypatch):
    """Errors, a stall and cuts in the middle of an epoch; the batches are those of the folder."""
    monkeypatch.setattr(remote, "TIMEOUT_SECONDS", 1)
    remote._system.cache_clear()
    names = [f"shard-{number:06d}.tar" for number in range(TARS)]
    server.faults = dict(zip(names, ([503] * 8, ["stall"], ["cut"] * 3), strict=False))
    with caplog.at_level("WARNING", logger="dit_fast"):
        ours = epoch(server.address, ShardCache(tmp_path), num_workers=1)
    remote._system.cache_clear()
    theirs = epoch(built, None, num_workers=0)
    assert torch.equal(ours["moments"], theirs["moments"])
    assert not any(server.faults.values())
    assert "503 Service Unavailable; trying again from byte 0 in" in caplog.text
    assert "(retry 8 of 10)" in caplog.text
    assert "no answer in 1 s; trying again" in caplog.text
    assert "the answer ended early; trying again" in caplog.text


def test_patience_has_an_end(server, tmp_path):
    server.faults = {"dataset.json": [503] * 99}
    with pytest.raises(DataError, match=r"dataset.json: cannot be read \(503 .*10 retries made") as caught:
        open_dataset(server.address)
    assert "\n" not in str(caught.value)
    assert len(server.pauses) == 10
    assert max(server.pauses) <= 1.25 * 30
    server.faults = {"shard-000001.tar": ["cut"] * 99}
    with pytest.raises(DataError, match=r"shard-000001.tar: cannot be read \(the answer ended early\), 10 retries"):
        epoch(server.address, ShardCache(tmp_path), num_workers=1)


@pytest.mark.parametrize(("fault", "words"), [(401, "answers 401"), (404, "answers 404"), ("loop", "without end")])
def test_answers_that_are_not_the_file_are_final_and_one_line(server, fault, words, caplog):
    server.faults = {"dataset.json": [fault] * 99}
    with pytest.raises(DataError, match=f"dataset.json: .*{words}") as caught:
        open_dataset(server.address)
    assert str(caught.value).isprintable()
    assert server.address not in caplog.text


def test_no_server_and_no_host(monkeypatch):
    monkeypatch.setattr(remote, "pause", lambda *_: None)
    with pytest.raises(DataError, match=r"127.0.0.1:9/dataset.json: cannot be read \(Connection refused\)"):
        open_dataset("http://127.0.0.1:9")
    for address in ("http://127.0.0.1:port/x", "http://a b/x", "http://\udcff/x", "http://h.invalid/x y"):
        with pytest.raises(DataError) as caught:
            open_dataset(address)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("http", "aiohttp")])
def test_a_store_whose_package_is_absent_names_it(scheme, package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    remote._system.cache_clear()
    with pytest.raises(DataError, match=rf"^{scheme}:// .*{package}, .*pip install 'dit_fast\[remote\]'"):
        open_dataset(f"{scheme}://bucket/shards")
    remote._system.cache_clear()


@pytest.mark.parametrize("change", [b"", b"more"])
def test_files_of_another_length_are_refused(server, copied, change):
    server.folder = copied
    dataset = open_dataset(server.address)
    data = (copied / "shard-000002.tar").read_bytes()
    (copied / "shard-000002.tar").write_bytes(data[:-700] if not change else data)
    reader = IndexedReader(dataset, (), True, ShardCache(copied / "cache"))
    if change:  # what lies behind is not asked for
        (copied / "shard-000002.tar").write_bytes(data + change)
        reader.read(np.arange(COUNT), np.arange(COUNT))
        return
    with pytest.raises(DataError, match=r"shard-000002.tar: has \d+ bytes where \d+ are expected"):
        reader.read(np.arange(COUNT), np.arange(COUNT))


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_fetch_each_shard_once_and_hardly_more_than_what_is_needed(server, built, tmp_path, world_size):
    """At most 1.05 times: all tars once, the description and all indexes for each rank; the bodies of all answers are
    counted. Each rank has the positions that the plan gives it."""
    found = [None] * world_size

    def run(rank):
        found[rank] = epoch(server.address, ShardCache(tmp_path), rank, world_size, num_workers=1)

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    whole = epoch(built, None)
    for rank in range(world_size):
        assert torch.equal(found[rank]["position"], whole["position"].view(-1, world_size)[:, rank])
        assert torch.equal(found[rank]["moments"], whole["moments"][rank::world_size])
    asked = [name for name, _ in server.asked if name.endswith(".tar")]
    assert sorted(asked) == sorted(set(asked))
    assert len(asked) == TARS
    tars, described = (
        sum(path.stat().st_size for path in built.iterdir() if path.suffix in suffixes)
        for suffixes in ({".tar"}, {".json", ".idx"})
    )
    assert tars < server.sent <= 1.05 * (tars + world_size * described)
    server.asked.clear()
    epoch(server.address, ShardCache(tmp_path), start=16)  # started again: nothing is fetched twice
    assert not any(name.endswith(".tar") for name, _ in server.asked)


@pytest.mark.parametrize("end", ["closed", "error"])
@pytest.mark.parametrize("fault", [503, "stall"])
def test_threads_that_wait_for_a_server_end_with_their_loader(built, tmp_path, fault, end):
    """While they pause before another try (7 s are asked for) and while an answer does not come (30 s here)."""
    before = set(threading.enumerate())

    def running():
        return [each for each in set(threading.enumerate()) - before if each.name.startswith(("read-", "fetch-"))]

    with serving(built) as server:
        dataset, cache = open_dataset(server.address), ShardCache(tmp_path)
        plan = Plan(dataset.info.shard_sizes, 0, 2)
        later = [dataset.info.shards[shard] for shard in plan.group(plan.group(0).stop).shards]
        server.faults = {shard.name: [fault] * 99 for shard in later}
        if end == "error":
            server.faults[later[0].name] = [404] * 99  # whichever thread asks, and however often
        sizes = {"global_batch": 4, "micro_batch": 4, "rank": 0, "world_size": 1, "start": 0}
        loader = build_loader(dataset, plan, **sizes, num_workers=2, cache=cache)
        next(loader)
        while not {name for name, _ in server.asked} >= {shard.name for shard in later}:
            time.sleep(0.01)
        if end == "closed":
            loader.close()
        else:
            with pytest.raises(DataError, match="404"):
                list(loader)
        for thread in running():
            thread.join(5)
        assert not running()
        server.hurry.set()
        with pytest.raises(DataError, match="this ShardCache was closed with its loader"):
            cache.path(dataset.root, replace(later[1], sha256="0" * 64))  # no copy of such a one is there


def test_a_part_that_a_killed_process_left_is_gone_on_with(server, built, tmp_path):
    cache, dataset = ShardCache(tmp_path), open_dataset(built)
    place = cache._place(server.address, dataset.info.shards[0])
    data = (built / "shard-000000.tar").read_bytes()
    place.with_suffix(".partial").write_bytes(data[:5000])
    assert cache.path(server.address, dataset.info.shards[0]).read_bytes() == data
    assert server.asked == [("shard-000000.tar", f"bytes=5000-{len(data) - 1}")]


def test_the_oldest_copies_make_room(server, built, tmp_path):
    size = max(path.stat().st_size for path in built.glob("*.tar"))
    cache, shards = ShardCache(tmp_path, 3 * size), open_dataset(built).info.shards
    for number, shard in enumerate(shards[:5]):
        os.utime(cache.path(server.address, shard), (number, number))
    left = {cache._place(server.address, shard) for shard in shards[2:5]}
    assert set(tmp_path.iterdir()) == left
    with pytest.raises(ConfigError, match=r"data.cache_gib allows .* two groups of 2 shards take up to"):
        epoch(server.address, cache)
    server.asked.clear()
    four = ShardCache(tmp_path, 4 * size)
    assert torch.equal(epoch(server.address, four)["moments"], epoch(built, None)["moments"])
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4 * size


def test_a_copy_that_went_bad_is_fetched_again_and_a_bad_shard_is_named(server, copied, tmp_path):
    server.folder, dataset = copied, open_dataset(server.address)
    cache, index = ShardCache(tmp_path), dataset.indexes[3]
    bit = 8 * (int(index.offset[2, index.members.index("moments.npy")]) + 300) + 2
    flip(cache.path(server.address, dataset.info.shards[3]), bit)
    every = np.arange(COUNT)
    batch = IndexedReader(dataset, (), True, cache).read(every, every)
    assert torch.equal(batch["moments"], IndexedReader(open_dataset(copied)).read(every, every)["moments"])
    flip(copied / "shard-000003.tar", bit)
    flip(cache.path(server.address, dataset.info.shards[3]), bit)
    for _ in range(2):  # fetched again once
        with pytest.raises(DataError, match=r"shard-000003.tar: 000000026.moments.npy is corrupt"):
            IndexedReader(dataset, (), True, cache).read(every, every)
    assert sum(name == "shard-000003.tar" for name, _ in server.asked) == 2


def test_signed_addresses_and_capital_schemes(server, built):
    server.query = "sig=a%2Fb&x=1"
    address = f"HTTP{server.address[4:]}/deep/?{server.query}"
    assert same(read(address, "stream"), read(built, "stream"))
    assert check_address("HTTPS://H/a/?q=/") == "https://H/a?q=/"
    assert join("https://h/a?q=1", "x.tar") == "https://h/a/x.tar?q=1"
    assert join("/data/what?", "x.tar") == "/data/what?/x.tar"  # a folder
    server.query = "sig=other"
    with pytest.raises(DataError, match="the server answers 403"):
        open_dataset(address)


def test_the_autoencoder_is_taken_from_beside_the_shards(server, built, copied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing lies here
    server.query = "sig=1"
    server.faults = {"autoencoder.safetensors": [503, "cut"]}
    theirs = autoencoders.of(open_dataset(f"{server.address}/?sig=1"))
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(theirs.encode(images)[0], autoencoders.of(open_dataset(built)).encode(images)[0])
    server.folder = copied
    for data, words in ((b"", "cannot be read as a patch PCA"), (None, "the server answers 404")):
        (copied / "autoencoder.safetensors").unlink()
        if data is not None:
            (copied / "autoencoder.safetensors").write_bytes(data)
        with pytest.raises(DataError, match=words):
            autoencoders.of(open_dataset(f"{server.address}?sig=1"))
    rewrite(copied, lambda content: content["autoencoder"].update(spec="diffusers:./vae"))
    with pytest.raises(DataError, match="cannot be read over http; download it"):
        autoencoders.of(open_dataset(f"{server.address}?sig=1"))
    assert len(open_dataset(built)) == COUNT
