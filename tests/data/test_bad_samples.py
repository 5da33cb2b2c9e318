"""A bad sample is named, or replaced by one of its shard group that depends on its position alone."""

import os
import pickle

import numpy as np
import pytest
import torch

from dit_fast.data import Plan, build_loader, open_dataset
from dit_fast.data.batch import BadSample
from dit_fast.data.index import index_from_bytes
from dit_fast.errors import DataError
from tests.helpers.damage import flip, replace_member
from tests.helpers.shard_sets import everything
from tests.helpers.toy_runs import make_shards

GLOBAL, COUNT = 8, 48
CORRUPT, NOT_FINITE = 20, 5  # sample numbers, in different shards of 16


def member(folder, sample):
    """(tar, row, column, first byte, length) of a sample's moments."""
    tar = folder / f"shard-{sample // 16:06d}.tar"
    index, row = index_from_bytes(tar.with_suffix(".idx").read_bytes(), "index"), sample % 16
    column = index.members.index("moments.npy")
    return tar, row, column, int(index.offset[row, column]), int(index.length[row, column])


def corrupt(folder, sample):
    tar, _, _, start, length = member(folder, sample)
    flip(tar, 8 * (start + length - 3))


def poison(folder, sample):
    """NaN, with the crc in the index right."""
    tar, row, column, start, length = member(folder, sample)
    payload = bytearray(tar.read_bytes()[start : start + length])
    payload[128:130] = np.float16("nan").tobytes()
    replace_member(folder, tar, row, column, bytes(payload))


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """(data set with two bad samples, its samples before they were bad)."""
    folder = make_shards(tmp_path_factory.mktemp("bad"), COUNT)
    truth = everything(folder)
    poison(folder, NOT_FINITE)
    corrupt(folder, CORRUPT)
    return folder, truth


def loaded(folder, size=1, start=0, group=2, steps=12, micro=2, **options):
    """What all ranks are given: label and moments by position, and the replacements by position."""
    dataset, found, told = open_dataset(folder), {}, {}
    plan = Plan(dataset.info.shard_sizes, 0, group)

    def on_bad(each):
        told[each.position] = each

    for rank in range(size):
        sizes = {"global_batch": GLOBAL, "micro_batch": micro, "rank": rank, "world_size": size}
        batches = build_loader(dataset, plan, **sizes, start=start, **{"on_bad": on_bad, **options})
        for _ in range(steps * GLOBAL // micro // size):
            batch = next(batches)
            for place, label, moments in zip(batch["position"].tolist(), batch["label"], batch["moments"], strict=True):
                found[place] = (int(label), moments.clone())
        batches.close()
    last = start + steps * GLOBAL
    return found, {place: each for place, each in told.items() if place < last}, plan


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        ours[place][0] == theirs[place][0] and torch.equal(ours[place][1], theirs[place][1]) for place in ours
    )


def test_the_sample_in_its_place_follows_from_the_position(bad):
    folder, truth = bad
    found, told, plan = loaded(folder)
    order = plan.indices(0, 96)
    assert sorted(told) == np.flatnonzero(np.isin(order, (CORRUPT, NOT_FINITE))).tolist()
    assert len(told) == 4  # two in each epoch
    for place, each in told.items():
        group = plan.group(place)
        samples, k = plan.order(group), 1
        while (by := samples[(place - group.start + k * 2654435761) % len(samples)]) in (CORRUPT, NOT_FINITE):
            k += 1
        assert (each.sample, each.by) == (order[place], by)
        assert by // 16 in group.shards  # no other shard is fetched for it
        assert each.shard == f"shard-{each.sample // 16:06d}.tar"
        assert ("is corrupt" if each.sample == CORRUPT else "holds NaN") in each.error
    for place, (label, moments) in found.items():  # all others as before, and what is there instead is whole
        sample = told[place].by if place in told else order[place]
        assert label == truth["label"][sample]
        assert torch.equal(moments, truth["moments"][sample])


@pytest.mark.parametrize(
    "options",
    [
        {"size": 4},
        {"micro": 8},
        {"num_workers": 3},
        {"reader": "stream"},
        {"size": 2, "reader": "stream", "num_workers": 2},
    ],
    ids=str,
)
def test_it_is_the_same_for_every_world_reader_and_number_of_threads(bad, options):
    found, told, _ = loaded(bad[0])
    again, said, _ = loaded(bad[0], **options)
    assert same(found, again)
    assert said == told


def test_it_is_the_same_after_a_resume(bad):
    found, told, _ = loaded(bad[0])
    rest, said, _ = loaded(bad[0], start=40, steps=7)
    assert same({place: found[place] for place in range(40, 96)}, rest)
    assert said == {place: each for place, each in told.items() if place >= 40}


def test_without_a_listener_it_is_an_error_that_carries_its_number(bad):
    with pytest.raises(BadSample, match=r"shard-000001\.tar: 000000020\.moments\.npy is corrupt") as raised:
        _first(bad[0], CORRUPT)
    assert (raised.value.sample, raised.value.shard) == (CORRUPT, "shard-000001.tar")
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def _first(folder, sample):
    """Reads a batch that begins with a sample, strictly."""
    dataset = open_dataset(folder)
    plan = Plan(dataset.info.shard_sizes, 0, 2)
    place = int(np.flatnonzero(plan.indices(0, COUNT) == sample)[0])
    sizes = {"global_batch": 1, "micro_batch": 1, "rank": 0, "world_size": 1}
    return next(build_loader(dataset, plan, **sizes, start=place))


def test_a_member_that_the_disk_refuses_is_a_bad_sample(bad, monkeypatch):
    """Compiled code gives what it cannot read to Python, which says so."""
    real, wrong = os.pread, member(bad[0], CORRUPT)[3]

    def pread(file, length, offset):
        if offset == wrong:
            raise OSError(5, "Input/output error")
        return real(file, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(BadSample, match=r"000000020\.moments\.npy cannot be read \(Input/output error\)"):
        _first(bad[0], CORRUPT)


def test_a_group_of_bad_samples_alone_and_a_shard_that_is_gone_end_the_run(tmp_path):
    folder = make_shards(tmp_path, COUNT)
    for sample in range(16, 32):
        corrupt(folder, sample)
    with pytest.raises(BadSample, match="16 other samples in its place are bad too"):
        loaded(folder, group=1, steps=6)
    found, told, _ = loaded(folder, group=0, steps=6)  # among all shards there are good ones
    assert len(found) == COUNT
    assert sorted(each.sample for each in told.values()) == [*range(16, 32)]
    dataset = open_dataset(folder)
    (folder / "shard-000001.tar").unlink()
    sizes = {"global_batch": COUNT, "micro_batch": COUNT, "rank": 0, "world_size": 1, "start": 0}
    batches = build_loader(dataset, Plan(dataset.info.shard_sizes, 0, 0), **sizes, on_bad=print)
    with pytest.raises(DataError, match=r"shard-000001\.tar") as raised:
        next(batches)
    assert not isinstance(raised.value, BadSample)
