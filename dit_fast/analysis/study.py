"""The study of one run over checkpoints and times, and of several runs beside each other, kept as arrays.

RUN/analysis/blocks.npz, of S checkpoints, T times, K blocks and M loss terms, all float64 unless said:

    steps int64 [S], times [T]
    cka_linear, cka_rbf [S, T, K, K]; cosine [S, T, K, K]; rank [S, T, K]
    orthogonality, mutual_information, dispersion [S, T]
    gradient_terms str [M], gradient_norm, gradient_projection [S, M, K] (NaN for a term that did not count then)
    protocol str: JSON of all that decided these numbers

RUN/analysis/between.npz, of R runs with B blocks in all: runs str [R], steps, blocks int64 [R], times [T], cka_linear,
cka_rbf [T, B, B], protocol. Files are written whole, and read with allow_pickle=False.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dit_fast import files
from dit_fast.analysis.blocks import BlockStudy, Inputs, compare_runs, study_blocks
from dit_fast.analysis.gradients import TermGradients, term_gradients
from dit_fast.analysis.similarity import KERNELS, Kernel
from dit_fast.checkpoint.run import load_run, refuse_runs_inside
from dit_fast.checkpoint.step import Checkpoint, open_checkpoint, step_folders
from dit_fast.data import LatentDataset
from dit_fast.errors import CheckpointError, UserError

FOLDER, BLOCKS, BETWEEN = "analysis", "blocks.npz", "between.npz"
Arrays = Mapping[str, np.ndarray]
Seen = Callable[[int], object]


@dataclass(frozen=True)
class Options:
    """What is studied. times: noise levels, from 0 (data) to 1 (noise); the smallest is the one of Figure 1.

    width: of the RBF kernel, in medians of the distances. weights: "ema" or "model", for everything but gradients.
    gradient_batches: micro-batches, 0 = no gradients. Raises UserError for values out of range.
    """

    times: tuple[float, ...] = (0.04, 0.25, 0.5, 0.75, 0.96)
    kernels: tuple[Kernel, ...] = KERNELS
    width: float = 1.0
    weights: Literal["ema", "model"] = "ema"
    count: int = 1024
    minibatch: int = 256
    batch: int = 64
    seed: int = 0
    gradient_batches: int = 4

    def __post_init__(self) -> None:
        if not self.times or not all(0 <= t <= 1 for t in self.times) or len(set(self.times)) < len(self.times):
            raise UserError(f"--times {_listed(self.times)}: give different numbers from 0 (data) to 1 (noise)")
        unknown = [kernel for kernel in self.kernels if kernel not in KERNELS]
        if unknown or not self.kernels or len(set(self.kernels)) < len(self.kernels):
            raise UserError(f"--kernels {_listed(self.kernels)}: give one or more of {_listed(KERNELS)}")
        if not 0 < self.width < float("inf"):
            raise UserError(f"--rbf-width {self.width}: must be above 0")
        if self.gradient_batches < 0 or not 0 <= self.seed < 2**64:
            raise UserError("--gradient-batches and --seed must not be negative (a seed is below 2^64)")

    def inputs(self, dataset: LatentDataset) -> Inputs:
        return Inputs(dataset, self.count, self.minibatch, self.batch, self.seed)

    def protocol(self, checkpoints: Sequence[Checkpoint], dataset: LatentDataset) -> str:
        """All that decides the numbers, as JSON; the batch of a forward does not."""
        return json.dumps(
            {
                "steps": [each.step for each in checkpoints],
                "weights": self.weights,
                "sha256": [each.digest(self.weights) for each in checkpoints],
                "dataset": dataset.info.fingerprint,
                **{name: getattr(self, name) for name in ("count", "minibatch", "seed", "times", "kernels", "width")},
                "gradient_batches": self.gradient_batches,
                "cka": "HSIC_1, mean over minibatches, token-pooled features",
            }
        )


def checkpoints_of(run: Path, steps: Sequence[int] = ()) -> list[Checkpoint]:
    """The checkpoints of a run folder in order, or those of these steps. Raises CheckpointError for what is missing."""
    refuse_runs_inside(run)
    found = dict(step_folders(run))
    if not found:
        raise CheckpointError(f"{run}: holds no checkpoint; give the folder of a run that has saved one")
    for step in steps:
        if step not in found:
            raise CheckpointError(f"{run}: has no checkpoint of step {step}, but {_listed(sorted(found))}")
    return [open_checkpoint(found[step]) for step in sorted(set(steps) or found)]


def study_run(
    checkpoints: Sequence[Checkpoint], dataset: LatentDataset, options: Options, seen: Seen = lambda count: None
) -> dict[str, np.ndarray]:
    """The arrays of `blocks.npz`. seen: told the images of each forward."""
    inputs = options.inputs(dataset)
    studies: list[list[BlockStudy]] = []
    gradients: list[TermGradients] = []
    for checkpoint in checkpoints:
        loaded = load_run(checkpoint.path, options.weights)
        studies.append([study_blocks(loaded, inputs, t, options.kernels, options.width, seen) for t in options.times])
        if options.gradient_batches:
            gradients.append(term_gradients(checkpoint, dataset, options.gradient_batches, options.seed, seen))
    names = ("cosine", "rank", "orthogonality", "mutual_information", "dispersion")
    return {
        "steps": np.array([each.step for each in checkpoints], np.int64),
        "times": np.array(options.times, np.float64),
        **{
            f"cka_{kernel}": np.array([[study.cka[kernel] for study in row] for row in studies])
            for kernel in options.kernels
        },
        **{name: np.array([[getattr(study, name) for study in row] for row in studies], np.float64) for name in names},
        **_aligned(gradients),
        "protocol": np.array(options.protocol(checkpoints, dataset)),
    }


def _aligned(gradients: Sequence[TermGradients]) -> dict[str, np.ndarray]:
    """Of all checkpoints, on one list of terms."""
    if not gradients:
        return {}
    terms = list(dict.fromkeys(term for each in gradients for term in each.terms))
    shape = (len(gradients), len(terms), gradients[0].norm.shape[1])
    norm, projection = np.full(shape, np.nan), np.full(shape, np.nan)
    for row, each in enumerate(gradients):
        places = [terms.index(term) for term in each.terms]
        norm[row, places], projection[row, places] = each.norm, each.projection
    return {"gradient_terms": np.array(terms), "gradient_norm": norm, "gradient_projection": projection}


def study_between(
    checkpoints: Mapping[str, Checkpoint], dataset: LatentDataset, options: Options, seen: Seen = lambda count: None
) -> dict[str, np.ndarray]:
    """The arrays of `between.npz`, of one checkpoint of each run by name."""
    runs = [load_run(checkpoint.path, options.weights) for checkpoint in checkpoints.values()]
    inputs = options.inputs(dataset)
    found = [compare_runs(runs, inputs, t, options.kernels, options.width, seen) for t in options.times]
    return {
        "runs": np.array(list(checkpoints)),
        "steps": np.array([run.step for run in runs], np.int64),
        "blocks": np.array([run.model.depth for run in runs], np.int64),
        "times": np.array(options.times, np.float64),
        **{f"cka_{kernel}": np.stack([each[kernel] for each in found]) for kernel in options.kernels},
        "protocol": np.array(options.protocol(list(checkpoints.values()), dataset)),
    }


def save(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read(path: Path) -> dict[str, Any]:
    """Arrays of a file that `save` wrote. Raises UserError for another one."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        str(arrays["protocol"])
        return arrays
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as an analysis ({error}); remove it") from None


def known(path: Path, protocol: str) -> dict[str, Any] | None:
    """What an earlier call found under the same protocol, if there is such a file."""
    if not path.is_file():
        return None
    arrays = read(path)
    return arrays if str(arrays["protocol"]) == protocol else None


def _listed(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))
