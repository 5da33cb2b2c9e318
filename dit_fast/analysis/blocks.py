"""Block outputs of trained models on real images, as they stream by: similarity, diversity, effective rank."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dit_fast.analysis.similarity import KERNELS, LEAST, MinibatchCKA, TokenSums
from dit_fast.autoencoders.pixels import to_model_space
from dit_fast.checkpoint.run import LoadedRun
from dit_fast.data import LatentDataset
from dit_fast.data.reader import IndexedReader
from dit_fast.diffusion import initial_noise
from dit_fast.diffusion.solvers import LAST_STOCHASTIC_TIME
from dit_fast.errors import UserError
from dit_fast.methods import METHODS
from dit_fast.models import new_model
from dit_fast.objectives.base import first
from dit_fast.ops.draws import Key
from dit_fast.tree import Tree, each, leaves, like


@dataclass(frozen=True)
class Inputs:
    """What models are shown: the first `count` samples of a data set with their labels, noise by (seed, sample).

    minibatch: samples that the CKA compares with each other; divides `count`. batch: samples in a forward, which
    changes nothing but memory. Raises UserError where the data set is smaller, or numbers do not divide.
    """

    dataset: LatentDataset
    count: int = 1024
    minibatch: int = 256
    batch: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count > len(self.dataset):
            raise UserError(f"--count {self.count}: the data set has {len(self.dataset)} samples; give at most that")
        if self.minibatch < LEAST or self.count % self.minibatch:
            raise UserError(
                f"--minibatch {self.minibatch} must be at least {LEAST} and divide --count {self.count} without rest"
            )
        if self.batch < 1:
            raise UserError(f"--batch {self.batch}: must be at least 1")


@dataclass(frozen=True)
class BlockStudy:
    """Of K blocks, float64: cka [K, K] by kernel; cosine [K, K]; rank [K], effective rank of each block's tokens;
    orthogonality, mutual_information, dispersion: terms of the diversity loss over all pairs of blocks.

    parameters: numbers the model holds, without modules that only training needs.
    """

    cka: dict[str, np.ndarray]
    cosine: np.ndarray
    rank: np.ndarray
    orthogonality: float
    mutual_information: float
    dispersion: float
    parameters: int = field(compare=False, default=0)


def study_blocks(
    loaded: LoadedRun,
    inputs: Inputs,
    t: float = LAST_STOCHASTIC_TIME,
    kernels: Sequence[str] = KERNELS,
    width: float = 1.0,
    seen: Callable[[int], object] = lambda count: None,
) -> BlockStudy:
    """Compares all blocks of a run's weights with each other. CKA is of token-pooled features.

    t: noise level of the inputs, from 0 (data) to 1 (noise); the default is the last one at which the published sampler
    calls the model, where the paper compares blocks. width: of the RBF kernel. seen: told the samples of each forward.
    Raises UserError for features that are not finite.
    """
    sums, ckas = TokenSums(), {kernel: MinibatchCKA(kernel, width) for kernel in kernels}  # type: ignore[arg-type]
    pooled: list[list[Tensor]] = []
    for features in block_features(loaded, inputs, t):
        sums.add(features)
        pooled.append([feature.double().mean(dim=1) for feature in features])
        if sum(len(chunk[0]) for chunk in pooled) == inputs.minibatch:
            for cka in ckas.values():
                cka.add([torch.cat(block) for block in zip(*pooled, strict=True)])
            pooled = []
        seen(len(features[0]))
    terms = sums.diversity()
    return BlockStudy(
        {kernel: cka.matrix().numpy() for kernel, cka in ckas.items()},
        sums.cosine().numpy(),
        sums.rank().numpy(),
        terms.orthogonality.item(),
        terms.mutual_information.item(),
        terms.dispersion.item(),
        sum(parameter.numel() for parameter in loaded.model.parameters()),
    )


def compare_runs(
    runs: Sequence[LoadedRun],
    inputs: Inputs,
    t: float = LAST_STOCHASTIC_TIME,
    kernels: Sequence[str] = KERNELS,
    width: float = 1.0,
    seen: Callable[[int], object] = lambda count: None,
) -> dict[str, np.ndarray]:
    """CKA by kernel between the blocks of several runs on the same images and noise: [B, B], B blocks of all runs in
    order; otherwise as `study_blocks`."""
    ckas = {kernel: MinibatchCKA(kernel, width) for kernel in kernels}  # type: ignore[arg-type]
    pooled: list[list[Tensor]] = []
    for chunks in zip(*(block_features(run, inputs, t) for run in runs), strict=True):
        pooled.append([feature.double().mean(dim=1).cpu() for features in chunks for feature in features])
        if sum(len(chunk[0]) for chunk in pooled) == inputs.minibatch:
            for cka in ckas.values():
                cka.add([torch.cat(block) for block in zip(*pooled, strict=True)])
            pooled = []
        seen(len(pooled[-1][0]) if pooled else len(chunks[0][0]))
    return {kernel: cka.matrix().numpy() for kernel, cka in ckas.items()}


def block_features(loaded: LoadedRun, inputs: Inputs, t: float) -> Iterator[list[Tensor]]:
    """Outputs [n, T, D] of all blocks, in float32, for at most inputs.batch samples at a time; no forward crosses the
    bounds of a minibatch. On the GPU, where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = loaded.model.to(device).eval()
    for start in range(0, inputs.count, inputs.minibatch):
        for begin in range(start, start + inputs.minibatch, inputs.batch):
            chosen = np.arange(begin, min(begin + inputs.batch, start + inputs.minibatch), dtype=np.int64)
            clean, labels = _clean(loaded, inputs.dataset, chosen, inputs.seed)
            noise = like(clean, leaves(initial_noise(inputs.seed, torch.from_numpy(chosen), model.shapes)))
            times = loaded.objective.from_unit(torch.full((len(chosen),), t, dtype=torch.float32))
            noised = loaded.objective.interpolate(clean, each(torch.Tensor.float, noise), first(times))[0]
            with torch.no_grad():
                shown = each(lambda leaf: leaf.to(device), noised)
                _, taps = model(shown, times.to(device), labels.to(device), taps=range(model.depth))
            features = [taps[index].float() for index in range(model.depth)]
            for index, feature in enumerate(features):
                if not feature.isfinite().all():
                    raise UserError(
                        f"block {index} gives NaN or Inf with the weights of step {loaded.step}; they have diverged"
                    )
            yield features


def read_samples(dataset: LatentDataset, samples: np.ndarray, fields: Sequence[str] = ()) -> dict[str, Tensor]:
    """A batch of the samples with these numbers, as the trainer gets one, at positions equal to the numbers."""
    reader = IndexedReader(dataset, fields)
    try:
        return reader.read(samples, samples)
    finally:
        reader.close()


def _clean(loaded: LoadedRun, dataset: LatentDataset, samples: np.ndarray, seed: int) -> tuple[Tree, Tensor]:
    """What the run's model denoises, of these samples, and their labels; methods that add to the latents are asked."""
    adding = [config for config in loaded.config.methods if METHODS[config.name].adds]  # others may need absent files
    with torch.device("meta"):  # their heads are not wanted
        methods = [METHODS[config.name](config, new_model(loaded.config.model), dataset.info) for config in adding]
    images = set() if loaded.autoencoder is None else {"image"}
    batch = read_samples(dataset, samples, tuple(images.union(*(method.fields for method in methods))))
    own = loaded.autoencoder
    means = batch["moments"][:, 0] if own is None else own.encode(batch["image"].float() / 127.5 - 1)[0]
    x: Tree = to_model_space(means, own or dataset.info)
    for method in methods:
        batch |= method.complete(batch, active=False)
        x = method.state(x, batch, Key(seed, batch["position"]))
    return x, batch["label"]
