"""Full check of a local data set, and the way to make its indexes again: every byte of every tar."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dit_fast import autoencoders, files
from dit_fast.data.address import is_remote, reading
from dit_fast.data.batch import allocate, columns_of
from dit_fast.data.dataset import LatentDataset, open_dataset, open_index, read_description
from dit_fast.data.field import Family, ShardInfo
from dit_fast.data.files import digest_file, reason
from dit_fast.data.index import ShardIndex, index_path, index_to_bytes
from dit_fast.data.reader import MemberReader
from dit_fast.data.shards import scan_tar
from dit_fast.errors import DataError, UserError

CHUNK_SAMPLES = 64


def verify_dataset(
    path: str | Path, progress: Callable[[str], None] | None = None, problem: Callable[[str], None] | None = None
) -> LatentDataset:
    """Compares each tar's sha256 with `dataset.json` and each index with a fresh scan, and reads every value.

    `progress` is called with each shard's name when it has passed, `problem` with a line for each thing that is wrong;
    a damaged shard does not keep the others from being checked. Returns the opened data set.
    Raises DataError naming the first file that differs and the fix, and how many problems there are.
    """
    root, info = read_description(path)
    if is_remote(root):
        raise DataError(f"{root}: only local data sets are verified; download it first")
    problems: list[str] = []

    def note(line: str) -> None:
        problems.append(line)
        if problem is not None:
            problem(line)

    for family in info.families:
        first_key = 0
        for shard in family.shards:
            before = len(problems)
            for line in _shard_problems(root, shard, family, first_key, info.num_classes):
                note(line)
            if len(problems) == before and progress is not None:
                progress(shard.name)
            first_key += shard.samples
    if Path(info.autoencoder.partition(":")[2]).parent == Path(root).resolve():  # part of the data set
        try:
            autoencoders.of(LatentDataset(root, info, ()))
        except UserError as error:
            note(str(error))
    if problems:
        more = f" (the first of {len(problems)} problems)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}")
    return open_dataset(root)


def _shard_problems(root: str, shard: ShardInfo, family: Family, first_key: int, num_classes: int) -> Iterator[str]:
    """What is wrong with a shard, one line each."""
    tar, index, said = Path(root) / shard.name, None, ""
    try:
        index, _ = open_index(root, shard, family, first_key, num_classes)
    except DataError as error:
        said = str(error)
        yield said
    try:
        if not tar.is_file() or tar.stat().st_size != shard.bytes:
            return  # said by then
        if digest_file(tar).hex() != shard.sha256:
            yield f"{tar}: sha256 differs from dataset.json, the file is damaged; restore it or rebuild it"
        elif index is not None:
            if not _equal(scan_tar(tar), index):
                yield f"{tar}: its .idx differs from it; rebuild it with `dit-fast shards index {root}`"
            else:
                yield from _value_problems(root, Family((shard,), family.fields), index)
    except DataError as error:
        if str(error) != said:
            yield str(error)


def _value_problems(root: str, family: Family, index: ShardIndex) -> Iterator[str]:
    """The first sample of a shard that cannot be read or holds values that no autoencoder gives, and how many do."""
    columns, reader, bad = columns_of(root, family, (index,), tuple(family.fields)), MemberReader(), []
    batch = allocate(columns, CHUNK_SAMPLES)
    for first in range(0, len(index), CHUNK_SAMPLES):
        rows = np.arange(first, min(first + CHUNK_SAMPLES, len(index)))
        for part in (rows, *rows[:, None]):  # all at once, and one by one where that fails
            try:
                for column in columns:
                    reader.fill(column, batch[column.name][: len(part)], np.zeros_like(part), part)
            except DataError as error:
                if len(part) == 1:
                    bad.append(str(error))
            else:
                if part is rows:
                    break
    if bad:
        yield bad[0] + (f" ({len(bad)} such samples in this shard)" if len(bad) > 1 else "")


def _equal(fresh: ShardIndex, index: ShardIndex) -> bool:
    if set(fresh.members) != set(index.members) or len(fresh) != len(index):
        return False
    order = [fresh.members.index(member) for member in index.members]
    return np.array_equal(fresh.label, index.label) and all(
        np.array_equal(getattr(fresh, name)[:, order], getattr(index, name)) for name in ("offset", "length", "crc")
    )


def rebuild_index(tar: str | Path) -> ShardIndex:
    """Scans a tar and writes the `.idx` beside it; equal to the one its writer made.

    Raises DataError when the tar is missing or damaged, and when it is not the one that the `dataset.json` beside it
    names: an index of a damaged tar would make the damage legal.
    """
    path = Path(tar)
    with reading(str(path)):
        if not path.is_file():
            raise DataError(f"{path}: no such shard; restore it or rebuild it with `dit-fast shards build`")
    _, info = read_description(path.parent)
    shard = next((s for family in info.families for s in family.shards if s.name == path.name), None)
    if shard is None:
        raise DataError(f"{path}: dataset.json does not name this shard; move it out of the folder")
    if digest_file(path).hex() != shard.sha256:
        raise DataError(
            f"{path}: sha256 differs from dataset.json, the file is damaged and gets no index; restore or rebuild it"
        )
    index = scan_tar(path)
    try:
        files.replace(index_path(path), index_to_bytes(index))
    except OSError as error:
        raise DataError(f"{index_path(path)}: cannot be written ({reason(error)})") from None
    return index
