"""Which numbers there are of a network's features, what they are called, and what they need."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dit_fast.errors import UserError
from dit_fast.evaluation.features import ROWS, Features, Reference
from dit_fast.evaluation.metrics import (
    NEIGHBOURS,
    frechet_distance,
    gaussian_mmd,
    inception_score,
    kernel_distance,
    precision_recall,
)
from dit_fast.evaluation.networks import Network

METRICS = ("fd", "sfd", "is", "pr", "kd", "mmd")
DEFAULTS = {"adm": ("fd", "sfd", "is", "pr"), "torch-fidelity": ("fd", "is"), "encoder": ("fd", "kd", "pr")}
PART, PARTS, SHUFFLE = 5000, 10, 2020  # images of a part of IS (ADM); number of parts and key of their order (other)
_NEEDS = {"sfd": "mu_s and sigma_s", "pr": "images (arr_0)", "kd": "images (arr_0)", "mmd": "images (arr_0)"}


def check_metrics(asked: Sequence[str], network: Network) -> tuple[str, ...]:
    """The metrics asked for, or those usual with the network. Raises UserError for one that it cannot have."""
    for name in asked:
        if name not in METRICS:
            raise UserError(f"unknown metric '{name}'; valid: {', '.join(METRICS)}")
        if name in ("sfd", "is") and network.kind == "encoder":
            raise UserError(
                f"metric '{name}' is of the Inception network, not of {network.title}; give --network adm:FILE"
            )
    return tuple(dict.fromkeys(asked)) or DEFAULTS[network.kind]


def rows_needed(metrics: Sequence[str]) -> list[str]:
    """Names of the features whose rows are wanted of samples."""
    return ["pool"] * bool({"pr", "kd", "mmd"} & set(metrics)) + ["logits"] * ("is" in metrics)


def possible(metrics: Sequence[str], asked: bool, reference: Reference) -> tuple[tuple[str, ...], list[str]]:
    """The metrics that the reference allows, and a line for each that it does not. asked: raises UserError instead."""
    held, left = reference.features, []
    for name in metrics:
        lacks = (name == "sfd" and "spatial" not in held.moments) or (name in ("pr", "kd", "mmd") and not held.rows)
        if lacks:
            left.append(f"no {name}: the reference {reference.name} holds no {_NEEDS[name]}")
            if asked:
                raise UserError(f"{left[-1]}; drop it from --metrics or give another reference")
    names = {line.split()[1].rstrip(":") for line in left}
    return tuple(name for name in metrics if name not in names), left


def measure(samples: Features, reference: Reference, network: Network, metrics: Sequence[str]) -> dict[str, float]:
    """The numbers by their published names; of another network than Inception with its name behind."""
    end, ours, theirs = network.name and f"-{network.name}", samples.rows, reference.features
    found: dict[str, float] = {}
    for metric in metrics:
        if metric == "fd":
            found[f"FD{end}" if end else "FID"] = frechet_distance(samples.moments["pool"], theirs.moments["pool"])
        elif metric == "sfd":
            found["sFID"] = frechet_distance(samples.moments["spatial"], theirs.moments["spatial"])
        elif metric == "is":
            found["IS"] = _inception_score(ours["logits"], network)
        elif metric == "pr":
            found[f"precision{end}"], found[f"recall{end}"] = precision_recall(ours["pool"], theirs.rows["pool"])
        else:
            function, name = (kernel_distance, "KD") if metric == "kd" else (gaussian_mmd, "MMD")
            found[f"{name}{end}" if end else name.replace("KD", "KID")] = function(
                _some(ours["pool"]), theirs.rows["pool"]
            )
    return found


def described(metrics: Sequence[str], reference: Reference, network: Network) -> str:
    """How the numbers are made of the features, for the protocol."""
    parts = []
    rows = len(reference.features.rows["pool"]) if "pool" in reference.features.rows else 0
    if "is" in metrics:
        parts.append(f"IS in parts of {PART} in order" if network.kind == "adm" else f"IS in {PARTS} shuffled parts")
    if "pr" in metrics:
        parts.append(f"precision and recall with {NEIGHBOURS} neighbours in {rows} of the reference")
    if {"kd", "mmd"} & set(metrics):
        parts.append(f"kernels over all pairs with {rows} of the reference and at most {ROWS} samples")
    return ", ".join(parts)


def _inception_score(logits: Tensor, network: Network) -> float:
    if network.kind == "adm":
        return inception_score(logits, split=PART)
    order = np.random.RandomState(SHUFFLE).permutation(len(logits))  # that library's own
    return inception_score(logits[torch.from_numpy(order)], splits=PARTS)


def _some(rows: Tensor) -> Tensor:
    """At most ROWS, evenly spaced."""
    count = min(len(rows), ROWS)
    return rows[torch.arange(count, dtype=torch.int64) * len(rows) // count]
