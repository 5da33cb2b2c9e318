"""What opening a data set reads does not grow with it; the rest is checked when a group of shards comes up."""

import itertools

import pytest

from dit_fast.data import Plan, ShardCache, build_loader, dataset, open_dataset
from dit_fast.errors import DataError

GROUP, BATCH = 2, 4


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(dataset, "CHECKED_FIRST", 2)


def loader(opened, folder, rank, world_size, **options):
    sizes = {"global_batch": BATCH, "micro_batch": BATCH // world_size, "rank": rank, "world_size": world_size}
    plan = Plan(opened.info.shard_sizes, 0, GROUP)
    return build_loader(opened, plan, **sizes, start=0, cache=ShardCache(folder), **options)


def test_opening_reads_the_first_indexes_and_looks_for_all_files(copied, monkeypatch):
    real, read = dataset.read_bytes, []
    monkeypatch.setattr(dataset, "read_bytes", lambda place, limit: read.append(place[-10:]) or real(place, limit))
    open_dataset(copied)
    assert sorted(read) == ["000000.idx", "000001.idx", "taset.json"]
    for suffix, words in (("idx", "index is missing; rebuild it"), ("tar", "shard is missing; restore it")):
        (copied / f"shard-000005.{suffix}").rename(copied / "away")
        with pytest.raises(DataError, match=rf"shard-000005.{suffix}: {words}"):
            open_dataset(copied)
        (copied / "away").rename(copied / f"shard-000005.{suffix}")


@pytest.mark.parametrize("reader", ["indexed", "stream"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_index_ends_every_rank_at_the_first_batch_of_its_group(copied, tmp_path, reader, num_workers):
    """Also those whose samples lie in the group's other shard, and batches that would not have touched it."""
    opened = open_dataset(copied)
    plan = Plan(opened.info.shard_sizes, 0, GROUP)
    second = plan.group(plan.group(0).stop)
    bad = int(second.shards.max())
    assert bad >= 2, "not among those that are checked at the start"
    assert second.start % BATCH == 0
    place = copied / f"shard-{bad:06d}.idx"
    place.write_bytes(place.read_bytes()[:-1] + b"\0")
    good = second.start // BATCH
    for world_size in (1, 2):
        for rank in range(world_size):
            for each in (opened, open_dataset(copied, opened.digest)):
                batches = loader(each, tmp_path / "cache", rank, world_size, reader=reader, num_workers=num_workers)
                assert len(list(itertools.islice(batches, good))) == good
                with pytest.raises(DataError, match=rf"shard-{bad:06d}.idx: index checksum does not match"):
                    next(batches)
