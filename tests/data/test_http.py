"""Shards over http: what breaks on the way is asked for again; what is wrong is one line, at once."""

import numpy as np
import pytest
import torch

from dit_fast import autoencoders
from dit_fast.data import open_dataset, remote
from dit_fast.data.address import check_address, join
from dit_fast.data.remote import HttpStream
from dit_fast.errors import DataError
from tests.helpers.damage import read
from tests.helpers.http_server import serving
from tests.helpers.shard_sets import COUNT, rewrite


@pytest.fixture
def server(built, monkeypatch):
    pauses = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    with serving(built) as server:
        server.pauses = pauses
        yield server


def same(ours, theirs):
    return all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_answers_are_asked_for_again_from_where_they_broke(server, built, caplog, ranges):
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
    assert server.pauses[0] == server.pauses[2] == 7  # Retry-After of an answer that has one
    size = (built / "shard-000001.tar").stat().st_size
    assert [span for name, span in server.asked if name == "shard-000001.tar"][1] == f"bytes={size // 3}-"


def test_patience_has_an_end(server, caplog):
    server.faults = {"dataset.json": [503] * 99}
    with pytest.raises(DataError, match=r"dataset.json: cannot be read \(503 .*10 retries made") as caught:
        open_dataset(server.address)
    assert "\n" not in str(caught.value)
    assert len(server.pauses) == 10
    assert max(server.pauses) <= 30
    server.faults = {"shard-000001.tar": ["cut"] * 99}
    with pytest.raises(DataError, match=r"shard-000001.tar: cannot be read \(the answer ended early\), 10 retries"):
        read(server.address, "stream")


@pytest.mark.parametrize(
    ("fault", "words"),
    [(401, "answers 401"), (404, "answers 404"), ("loop", "the server answers 302"), ("packed", "packed .gzip.")],
)
def test_answers_that_are_not_the_file_are_final_and_one_line(server, fault, words):
    server.faults = {"dataset.json": [fault] * 99}
    with pytest.raises(DataError, match=f"dataset.json: .*{words}") as caught:
        open_dataset(server.address)
    assert str(caught.value).isprintable()
    assert not server.pauses


def test_no_server_and_no_host(monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    with pytest.raises(DataError, match=r"127.0.0.1:9/dataset.json: cannot be read \(Connection refused\)"):
        open_dataset("http://127.0.0.1:9")
    for address in ("http://127.0.0.1:port/x", "http://a b/x", "http://\udcff/x", "http://h.invalid/x y"):
        with pytest.raises(DataError) as caught:
            open_dataset(address)
        assert "\n" not in str(caught.value)


def test_files_of_another_length_are_refused_before_they_are_read(server):
    server.faults = {"shard-000002.tar": ["longer"]}
    with pytest.raises(DataError, match=r"shard-000002.tar: has (\d+) bytes where \d+ are expected"):
        read(server.address, "stream")
    assert not server.pauses


def test_a_stream_gives_each_byte_once_whatever_the_reads(server, built):
    server.faults = {"dataset.json": ["cut", "cut", 503, "cut"]}
    with HttpStream(f"{server.address}/dataset.json") as stream:
        parts = [stream.read(count) for count in (1, 700, 3, 10**6, 5)]
    assert b"".join(parts) == (built / "dataset.json").read_bytes()


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
