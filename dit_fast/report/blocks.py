"""Block outputs of a trained model on real images: their similarity and effective rank."""

from dataclasses import dataclass

import numpy as np
import torch

from dit_fast import autoencoders
from dit_fast.analysis.similarity import cka_matrix, effective_rank, token_cosine_matrix
from dit_fast.autoencoders.pixels import to_model_space, to_uint8
from dit_fast.checkpoint.run import LoadedRun
from dit_fast.data import LatentDataset
from dit_fast.data.reader import IndexedReader
from dit_fast.diffusion import initial_noise
from dit_fast.diffusion.solvers import LAST_STOCHASTIC_TIME
from dit_fast.errors import UserError
from dit_fast.methods import METHODS, build_methods
from dit_fast.models import new_model
from dit_fast.objectives.base import first
from dit_fast.ops.draws import Key
from dit_fast.tree import Tree, each, leaves, like


@dataclass(frozen=True)
class BlockStudy:
    """cka, cosine: float64 [K, K]; rank: float64 [K], effective rank of each block's tokens (K blocks).

    parameters: numbers the model holds, without modules that only training needs.
    """

    cka: np.ndarray
    cosine: np.ndarray
    rank: np.ndarray
    parameters: int


def study_blocks(
    loaded: LoadedRun, dataset: LatentDataset, count: int = 256, t: float = LAST_STOCHASTIC_TIME, seed: int = 0
) -> BlockStudy:
    """Compares all blocks of a run's weights on `count` real images with their labels.

    t: noise level of the inputs; the default is the last one at which the published sampler calls the model, where the
    paper compares blocks. Features are token-pooled for the CKA. Raises UserError for features that are not finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = loaded.model.to(device).eval()
    chosen = np.arange(min(count, len(dataset)), dtype=np.int64)
    clean, labels = _clean(loaded, dataset, chosen, seed)
    noise = like(clean, leaves(initial_noise(seed, torch.from_numpy(chosen), model.shapes)))
    times = loaded.objective.from_unit(torch.full((len(chosen),), t, dtype=torch.float32))
    noised = loaded.objective.interpolate(clean, each(torch.Tensor.float, noise), first(times))[0]
    with torch.no_grad():
        shown = each(lambda leaf: leaf.to(device), noised)
        _, taps = model(shown, times.to(device), labels.to(device), taps=range(model.depth))
    features = [taps[index].float().cpu() for index in range(model.depth)]
    for index, feature in enumerate(features):
        if not feature.isfinite().all():
            raise UserError(
                f"block {index} gives NaN or Inf with the weights of step {loaded.step}; they have diverged"
            )
    ranks = torch.stack([effective_rank(feature) for feature in features])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return BlockStudy(cka_matrix(features).numpy(), token_cosine_matrix(features).numpy(), ranks.numpy(), parameters)


def real_images(dataset: LatentDataset, classes: tuple[int, ...], per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of each class: uint8 [N, H, W, 3] and labels int64 [N].

    Images kept in the shards are shown as they are; otherwise the latents are decoded, so that samples are compared
    with what the autoencoder can show at all.
    """
    labels = dataset.labels
    chosen = np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in classes])
    if "image" in dataset.info.fields:
        pictures = _read(dataset, chosen, ("image",))["image"].permute(0, 2, 3, 1).numpy()
    else:
        means = _read(dataset, chosen)["moments"][:, 0]
        pictures = to_uint8(autoencoders.of(dataset).decode(means).float().numpy(), f"data set {dataset.root}")
    return pictures, labels[chosen]


def _clean(loaded: LoadedRun, dataset: LatentDataset, samples: np.ndarray, seed: int) -> tuple[Tree, torch.Tensor]:
    """What the run's model denoises, of these samples, and their labels; methods that add to the latents are asked."""
    adding = [config for config in loaded.config.methods if METHODS[config.name].adds]
    with torch.device("meta"):  # their heads are not wanted
        methods = build_methods(adding, new_model(loaded.config.model), dataset.info)
    images = set() if loaded.autoencoder is None else {"image"}
    batch = _read(dataset, samples, tuple(images.union(*(method.fields for method in methods))))
    own = loaded.autoencoder
    means = batch["moments"][:, 0] if own is None else own.encode(batch["image"].float() / 127.5 - 1)[0]
    x: Tree = to_model_space(means, own or dataset.info)
    for method in methods:
        batch |= method.complete(batch, active=False)
        x = method.state(x, batch, Key(seed, batch["position"]))
    return x, batch["label"]


def _read(dataset: LatentDataset, samples: np.ndarray, fields: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    reader = IndexedReader(dataset, fields)
    try:
        return reader.read(np.arange(len(samples)), samples)
    finally:
        reader.close()
