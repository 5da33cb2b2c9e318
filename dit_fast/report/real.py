"""Real images of a data set, as they are or as its autoencoder can show them."""

import numpy as np

from dit_fast import autoencoders
from dit_fast.analysis.blocks import read_samples
from dit_fast.autoencoders.pixels import to_uint8
from dit_fast.data import LatentDataset


def real_images(dataset: LatentDataset, classes: tuple[int, ...], per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of each class: uint8 [N, H, W, 3] and labels int64 [N].

    Images kept in the shards are shown as they are; otherwise the latents are decoded, so that samples are compared
    with what the autoencoder can show at all.
    """
    labels = dataset.labels
    chosen = np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in classes])
    if "image" in dataset.info.fields:
        pictures = read_samples(dataset, chosen, ("image",))["image"].permute(0, 2, 3, 1).numpy()
    else:
        means = read_samples(dataset, chosen)["moments"][:, 0]
        pictures = to_uint8(autoencoders.of(dataset).decode(means).float().numpy(), f"data set {dataset.root}")
    return pictures, labels[chosen]
