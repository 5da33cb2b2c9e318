"""The plan and both readers: one order, whatever the world size, the workers and the place of resuming."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from dit_fast.data import Plan, build_loader, open_dataset
from dit_fast.data.index import index_from_bytes, index_to_bytes
from dit_fast.data.reader import IndexedReader
from dit_fast.errors import ConfigError, DataError
from dit_fast.philox import Stream, uint32_numpy
from tests.helpers.cases import refused
from tests.helpers.damage import flip
from tests.helpers.http_server import serving
from tests.helpers.shard_sets import COUNT

SIZES = (8, 8, 8, 8, 8, 3)
BATCH = 8


def take(folder, count, *, seed=5, group=2, **options):
    dataset = open_dataset(folder)
    settings = {"global_batch": BATCH, "micro_batch": 4, "rank": 0, "world_size": 1, "start": 0, "fields": ("image",)}
    loader = build_loader(dataset, Plan(dataset.info.shard_sizes, seed, group), **{**settings, **options})
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def assert_same(ours, others):
    assert len(ours) == len(others)
    for a, b in zip(ours, others, strict=True):
        assert list(a) == list(b)
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("group", [1, 2, 4, 0, "all", 99])
def test_every_epoch_is_a_permutation_and_epochs_differ(group):
    plan = Plan(SIZES, 7, group)
    epochs = [plan.indices(e * COUNT, (e + 1) * COUNT) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(COUNT))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], Plan(SIZES, 8, group).indices(0, COUNT))
    assert np.array_equal(plan.indices(30, 100), np.concatenate(epochs)[30:100])
    assert plan.indices(5, 5).shape == (0,)


def test_exact_shuffle_is_the_sort_by_philox_keys():
    plan = Plan(SIZES, 11, 0)
    words = uint32_numpy(11, np.arange(2 * COUNT, 3 * COUNT), Stream.SAMPLE_ORDER, 2).astype(object)
    expected = sorted(range(COUNT), key=lambda i: (words[i][0], words[i][1]))
    assert plan.indices(2 * COUNT, 3 * COUNT).tolist() == expected
    assert np.array_equal(Plan((COUNT,), 11, 0).indices(0, COUNT), plan.indices(0, COUNT))  # however it is cut


def test_groups_hold_whole_shards():
    plan = Plan(SIZES, 3, 2)
    shard_of = np.repeat(np.arange(len(SIZES)), SIZES)
    order = plan.indices(0, COUNT)
    groups, position = [], 0
    while position < COUNT:
        groups.append(plan.group(position))
        position = groups[-1].stop
        assert set(shard_of[order[groups[-1].start : position]]) == set(groups[-1].shards.tolist())
    assert sorted(np.concatenate([group.shards for group in groups])) == list(range(len(SIZES)))


@pytest.mark.parametrize(
    ("sizes", "seed", "group", "epoch", "digest"),
    [
        (SIZES, 0, 2, 0, "2fe21cf72d7c5724daf725748ad55c2c"),
        (SIZES, 7, 0, 3, "b465fe46cad4dbaba39a0763dda51068"),
        ((5, 1, 9, 2, 7, 7, 3), 2**63 + 5, 3, 1, "44992750a1a79baa14e5ee437f884589"),
        ((100,) * 37 + (11,), 1, 8, 2, "0aac55971bf5eac9e318b198bd60def3"),
        ((1000,) * 1281 + (167,), 0, 64, 3, "5a8bfcb964ec8b0c84e5c03ff5570c7d"),
    ],
)
def test_the_order_is_that_of_the_first_release(sizes, seed, group, epoch, digest):
    """Recorded from code that sorted the whole epoch at once."""
    plan, count = Plan(sizes, seed, group), sum(sizes)
    order = plan.indices(epoch * count, (epoch + 1) * count)
    assert hashlib.sha256(order.tobytes()).hexdigest()[:32] == digest
    for start, stop in ((count // 3, count // 2), (count - 2, count), (count // 2, count // 2 + 1)):  # on resuming
        fresh = Plan(sizes, seed, group).indices(epoch * count + start, epoch * count + stop)
        assert np.array_equal(fresh, order[start:stop])


def test_a_group_is_all_that_is_ordered(monkeypatch):
    plan, made = Plan((100,) * 50, 3, 2), []
    real = plan._keys
    monkeypatch.setattr(
        plan, "_keys", lambda stream, base, first, last: made.append(last - first) or real(stream, base, first, last)
    )
    for position in range(0, 5000, 90):
        plan.indices(10 * 5000 + position, 10 * 5000 + position + 90)
    assert max(made) == 100
    assert sum(made) == 5000 + 50 + 50 + 200  # each once, and the start of the next epoch
    assert len(plan._orders) == len(plan._epochs) == 2


@pytest.mark.parametrize("sizes", [(), (3, 0)])
def test_bad_plans_are_refused(sizes):
    with pytest.raises(ConfigError):
        Plan(sizes, 0)
    with pytest.raises(ConfigError):
        Plan((3,), 0, -1)
    with pytest.raises(ConfigError):
        Plan((3,), 0).indices(4, 3)


@pytest.mark.parametrize("group", [1, 2, 0])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (3, 4)])
def test_both_readers_give_the_same_batches_over_epochs(built, group, rank, world_size):
    options = {"group": group, "rank": rank, "world_size": world_size, "micro_batch": 2}
    count = 3 * COUNT // (2 * world_size)
    assert_same(take(built, count, reader="indexed", **options), take(built, count, reader="stream", **options))


def test_union_of_ranks_does_not_depend_on_the_world_size(built):
    expected = Plan(SIZES, 5, 2).indices(0, 6 * BATCH).reshape(6, BATCH)
    reference = take(built, 6, micro_batch=BATCH)
    for world_size in (1, 2, 4):
        size = BATCH // world_size
        ranks = [take(built, 6, micro_batch=size, rank=r, world_size=world_size) for r in range(world_size)]
        for step in range(6):
            joined = torch.cat([ranks[r][step]["position"] for r in range(world_size)])
            order = joined.argsort()
            assert joined[order].tolist() == list(range(step * BATCH, (step + 1) * BATCH))
            for name in ("moments", "label", "image"):
                values = torch.cat([ranks[r][step][name] for r in range(world_size)])[order]
                assert torch.equal(values, reference[step][name])
    labels = open_dataset(built).labels
    assert [batch["label"].tolist() for batch in reference] == labels[expected].tolist()


@pytest.mark.parametrize("reader", ["indexed", "stream"])
@pytest.mark.parametrize("step", [1, 5, 6, 13])
def test_resuming_continues(built, reader, step):
    whole = take(built, 32, reader=reader)
    assert_same(take(built, 32 - 2 * step, start=step * BATCH, reader=reader), whole[2 * step :])


def test_resuming_with_another_batch_size_keeps_the_order(built):
    whole = torch.cat([batch["moments"] for batch in take(built, 16)])
    rest = torch.cat([batch["moments"] for batch in take(built, 5, start=24, global_batch=6, micro_batch=6)])
    assert torch.equal(rest, whole[24 : 24 + 30])


@pytest.mark.parametrize("reader", ["indexed", "stream"])
def test_workers_change_nothing(built, reader):
    assert_same(take(built, 15, reader=reader, num_workers=2), take(built, 15, reader=reader))


def test_streaming_over_http(built):
    with serving(built) as server:
        assert open_dataset(server.address).info.fingerprint == open_dataset(built).info.fingerprint
        assert_same(take(server.address, 14), take(built, 14))
        with pytest.raises(DataError, match="the indexed reader needs local shards"):
            take(server.address, 1, reader="indexed")


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("reader", ["indexed", "stream"])
@pytest.mark.parametrize("member", ["moments.npy", "png"])
def test_damage_is_one_line_that_names_shard_and_sample(copied, reader, num_workers, member):
    index = open_dataset(copied).indexes[3]
    flip(copied / "shard-000003.tar", 8 * (int(index.offset[2, index.members.index(member)]) + 300) + 2)
    message = refused(take, copied, 12, reader=reader, num_workers=num_workers)
    assert f"shard-000003.tar: 000000026.{member} is corrupt" in message


def test_bad_requests_are_refused_before_reading(built):
    with pytest.raises(ConfigError, match="global_batch 8 is not a multiple of micro_batch 3 x 1 ranks"):
        take(built, 1, micro_batch=3)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        take(built, 1, rank=2, world_size=2)
    with pytest.raises(ConfigError, match="unknown reader 'fast'"):
        take(built, 1, reader="fast")
    with pytest.raises(
        DataError, match=r"no field 'features' in the shards .fields there: image.; add it with `dit-fast shards add"
    ):
        take(built, 1, fields=("features",))
    dataset = open_dataset(built)
    with pytest.raises(DataError, match="the plan was made for 4"):
        build_loader(dataset, Plan((4,), 0), global_batch=1, micro_batch=1, rank=0, world_size=1, start=0)


def test_ranks_trust_the_digest_of_the_one_that_checked(copied, built, monkeypatch):
    digest = open_dataset(copied).digest
    monkeypatch.setattr("dit_fast.data.dataset.open_index", None)  # checks, which reads the tars
    dataset, every = open_dataset(copied, digest), np.arange(COUNT)
    theirs = IndexedReader(open_dataset(built, digest)).read(every, every)
    assert torch.equal(IndexedReader(dataset).read(every, every)["moments"], theirs["moments"])
    place = copied / "shard-000003.idx"
    index = index_from_bytes(place.read_bytes(), "")
    place.write_bytes(index_to_bytes(replace(index, crc=index.crc[::-1])))  # sound in itself
    with pytest.raises(DataError, match=r"shard-000003.idx: is not what rank 0 checked"):
        IndexedReader(open_dataset(copied, digest)).read(every, every)
    with pytest.raises(DataError, match="is not the data set that rank 0 opened"):
        open_dataset(copied, f"0{digest[1:]}" if digest[0] != "0" else f"1{digest[1:]}")


def test_indexes_in_memory_are_bounded(built, monkeypatch):
    monkeypatch.setattr("dit_fast.data.dataset.KEPT_BYTES", 1)
    dataset = open_dataset(built)
    assert len(dataset.labels) == COUNT
    assert len(dataset.indexes._kept) == 2
    dataset.indexes.keep(4)
    assert [index.first_key for index in dataset.indexes] == [0, 8, 16, 24, 32, 40]
    assert len(dataset.indexes._kept) == 4
