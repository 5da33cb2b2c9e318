"""Readers that `loading` compares: micro-batches of latents of 8x32x32 as float32, shuffled, without end."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MICRO = 32
SAMPLES, PER_SHARD, IMAGES = 4096, 256, 128
SHAPE = (2, 4, 32, 32)


def make(folder: Path) -> tuple[str, Path]:
    """Shards of random latents, and the same as one file a sample."""
    import numpy as np

    from dit_fast.data.shards import ShardWriter, npy_bytes
    from dit_fast.preparation.import_latents import import_latents

    arrays, tars, rng = folder / "arrays", folder / "tars", np.random.default_rng(0)
    arrays.mkdir()
    tars.mkdir()
    with open(tars / "0.tar", "wb") as file:
        writer = ShardWriter(file, ("npy", "cls"), 0)
        for number in range(SAMPLES):
            latent = np.abs(rng.normal(size=SHAPE)).astype(np.float16)
            np.save(arrays / f"{number:08d}.npy", latent)
            writer.add({"npy": npy_bytes(latent.reshape(-1, *SHAPE[2:]))}, 0)
        writer.finish()
    import_latents(tars, folder / "shards", form="mean-std", samples_per_shard=PER_SHARD, progress=False)
    return str(folder / "shards"), arrays


def make_images(folder: Path) -> str:
    """Shards of smooth pictures with some noise, as PNG beside latents of the same shape."""
    import numpy as np

    from dit_fast.preparation.build import build_shards

    rng, (y, x) = np.random.default_rng(0), np.mgrid[0:256, 0:256] / 256
    waves = [np.sin(rng.uniform(1, 20) * x + rng.uniform(1, 20) * y) for _ in range(IMAGES)]
    noise = rng.normal(0, 6, (IMAGES, 256, 256, 3))
    images = (127.5 + 100 * np.array(waves)[..., None] + noise).clip(0, 255).astype(np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.zeros(IMAGES, np.int64))
    build_shards(
        folder / "images.npz",
        folder / "images",
        autoencoder="pca",
        size=256,
        patch=8,
        channels=4,
        samples_per_shard=IMAGES // 4,
        store_images=True,
        device="cpu",
        progress=False,
    )
    return str(folder / "images")


def ours(shards: str, count: int, fields: tuple[str, ...] = ()) -> Iterator[Any]:
    from dit_fast.data import Plan, build_loader, open_dataset

    dataset = open_dataset(shards)
    plan = Plan(dataset.info.shard_sizes, 0, 64)
    sizes = {"global_batch": MICRO, "micro_batch": MICRO, "rank": 0, "world_size": 1, "start": 0}
    return build_loader(dataset, plan, **sizes, fields=fields, num_workers=count)


def _as_is(item: Any) -> Any:
    return item


class _Batches:
    """Micro-batches of an order by number, endless for all that matters."""

    def __init__(self, order: Callable[[int], Any], read: Callable[[Any], Any]):
        self._order, self._read = order, read

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, number: int) -> Any:
        return self._read(self._order(number))


def _loader(dataset: Any, count: int, **options: Any) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    return iter(DataLoader(dataset, num_workers=count, prefetch_factor=4 if count else None, **options))


def processes(shards: str, count: int) -> Iterator[Any]:
    import numpy as np

    from dit_fast.data import open_dataset
    from dit_fast.data.reader import IndexedReader

    reader = IndexedReader(open_dataset(shards))
    order = np.random.default_rng(1).permutation(SAMPLES)

    def samples(number: int) -> Any:
        return order[np.arange(number * MICRO, (number + 1) * MICRO) % SAMPLES]

    batches = _Batches(samples, lambda found: reader.read(found, found))
    return _loader(batches, count, batch_size=None, collate_fn=_as_is, sampler=range(1 << 30))


def npy(arrays: Path, count: int) -> Iterator[Any]:
    """A map-style data set: `np.load` of a sample's file, a label, torch's own shuffle and collate, without end."""
    import numpy as np
    import torch

    names, labels = sorted(str(path) for path in arrays.iterdir()), [0] * SAMPLES

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1 << 20

        def __getitem__(self, number: int) -> Any:
            number = int(number) % SAMPLES
            return torch.from_numpy(np.load(names[number], allow_pickle=False)).float(), torch.tensor(labels[number])

    return _loader(Files(), count, batch_size=MICRO, shuffle=True)


def _floats(sample: Any) -> Any:
    import torch

    return torch.from_numpy(sample["moments.npy"]).float(), sample["cls"]


def webdataset(shards: str, count: int) -> Iterator[Any]:
    import webdataset as wds

    urls = sorted(str(path) for path in Path(shards).glob("*.tar"))
    whole = wds.WebDataset(urls, shardshuffle=100, resampled=True).shuffle(2000).decode().map(_floats)
    return _loader(whole.batched(MICRO), count, batch_size=None)
