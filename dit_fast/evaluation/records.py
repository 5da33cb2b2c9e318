"""Where a measured number goes: RUN/evaluations.jsonl, one JSON object per evaluation, each with its protocol.

A line is an `Evaluation`:

    {"step": 400000, "values": {"FID": 8.1, "IS": 130}, "protocol": {}, "line": "", "at": "2026-11-26T17:50:00Z"}

step: of the weights; null for images of unknown origin. values: metric -> number; names are those of `direction`.
protocol: the fields of `Protocol`; a field that is null does not apply or is not known. line: the protocol as people
read it. at: UTC. Of lines with equal step and protocol the last stands. Readers: `read_evaluations`, `curve`,
`steps_to_reach`; `best` over a sweep.
"""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dit_fast.errors import DataError, UserError

FILE_NAME = "evaluations.jsonl"
HIGHER = ("IS", "precision", "recall")  # is better; of other metrics, lower is


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """All that decides a number beside the weights. Equal protocols give comparable numbers.

    network: what gave the features; network_identity: with the hash of its weights. resizing: how images came to its
    input. metrics: how the numbers are made of features where that is a choice (splits of IS, kernel of KD).
    reference: name and, in reference_identity, hash of what was compared with; reference_count and reference_size: its
    images, None where a file of statistics does not say. count: images evaluated; size: "256x256". labels: "balanced",
    "random", or None where images were given without; classes: those drawn, None for all that the data set has. The
    rest tells how a run drew them: sampler (with all its options but the seed, as captions have it), num_steps, nfe
    (evaluations of the model per image, counted; the two branches of guidance are one), guidance scale and [low, high]
    in t (1 is noise), seed, weights ("ema 0.9999" or "raw"), precision, decoder (identity of the autoencoder); None for
    images from files. samples: where such images come from.
    """

    network: str
    network_identity: str
    resizing: str
    metrics: str
    reference: str
    reference_identity: str
    reference_count: int | None
    count: int
    size: str
    reference_size: str | None = None
    labels: str | None = None
    classes: tuple[int, ...] | None = None
    sampler: str | None = None
    num_steps: int | None = None
    nfe: int | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    seed: int | None = None
    weights: str | None = None
    precision: str | None = None
    decoder: str | None = None
    samples: str | None = None

    def text(self) -> str:
        """One line for people: no number is shown without it."""
        drawn = [f"{self.count} images of {self.size}", f"{self.labels or 'unstated'} labels"]
        if self.classes is not None:
            drawn[-1] += f" of {len(self.classes)} classes alone ({_some(self.classes)})"
        if self.sampler is None:
            drawn.append(f"from {self.samples}, drawn in an unstated way")
        else:
            low, high = self.guidance_interval or (0, 1)
            interval = "" if self.guidance == 1 or (low, high) == (0, 1) else f" for t in [{low:g}, {high:g}]"
            drawn += [self.sampler, f"NFE {self.nfe}"]
            told = "guidance " in self.sampler  # as `dit-fast evaluate` writes it
            drawn += [f"guidance {self.guidance:g}{interval}"] * (not told)
            drawn += [f"seed {self.seed}"] * (self.seed is not None)
            drawn += [f"weights {self.weights}", f"{self.precision}", f"decoder {self.decoder}"]
        other = f" of {self.reference_size}" * (self.reference_size not in (None, self.size))
        known = "" if self.reference_count is None else f" ({self.reference_count} images{other})"
        measured = [f"network {self.network}", self.resizing, *([self.metrics] if self.metrics else [])]
        return "; ".join([", ".join(drawn), f"reference {self.reference}{known}", ", ".join(measured)])


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One line of the file. values: by metric."""

    step: int | None
    values: Mapping[str, float]
    protocol: Protocol
    at: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), compare=False)

    def json(self) -> str:
        content = {"step": self.step, "values": dict(self.values), "protocol": asdict(self.protocol)}
        return json.dumps(content | {"line": self.protocol.text(), "at": self.at})


def direction(metric: str) -> int:
    """1 where a higher value is better, else -1.

    Metrics: FID, sFID, IS, precision, recall, KID of the Inception network; of another network X (EffLite0, DINOv2-L,
    ...) FD-X, KD-X, MMD-X, precision-X, recall-X.
    """
    return 1 if metric.partition("-")[0] in HIGHER else -1


def append_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Adds a line to the file of a run folder. Raises UserError for a value that is not finite, with its metric."""
    for name, value in evaluation.values.items():
        if not math.isfinite(value):
            raise UserError(f"{name} is {value}, which is no result; see that the images and the reference are whole")
    path = folder / FILE_NAME
    whole = not path.exists() or not path.stat().st_size or path.read_bytes().endswith(b"\n")
    with path.open("ab") as file:  # one write: readers see whole lines, but for one that a kill cut
        file.write(("" if whole else "\n").encode() + evaluation.json().encode() + b"\n")


def read_evaluations(folder: Path) -> list[Evaluation]:
    """What was measured of a run, in order; [] where nothing was. A last line that a kill cut is left out.

    Raises DataError for a line that is none of ours.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return []
    found: dict[tuple[int | None, Protocol], Evaluation] = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            content = json.loads(line)
        except ValueError:
            continue  # cut by a kill
        try:
            evaluation = _evaluation(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: line {number} is no evaluation ({error}); remove it") from None
        place = (evaluation.step, evaluation.protocol)
        if earlier := found.pop(place, None):
            evaluation = Evaluation(
                step=evaluation.step,
                values={**earlier.values, **evaluation.values},
                protocol=evaluation.protocol,
                at=evaluation.at,
            )
        found[place] = evaluation
    return list(found.values())


def _evaluation(content: Mapping[str, Any]) -> Evaluation:
    known = {item.name for item in fields(Protocol)}
    own = {name: value for name, value in content["protocol"].items() if name in known}
    if own.get("guidance_interval") is not None:
        low, high = own["guidance_interval"]
        own["guidance_interval"] = (float(low), float(high))
    if own.get("classes") is not None:
        own["classes"] = tuple(int(label) for label in own["classes"])
    values = {str(name): float(value) for name, value in content["values"].items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
    if content["step"] is not None and type(content["step"]) is not int:
        raise ValueError(f"step is {content['step']!r}")
    return Evaluation(step=content["step"], values=values, protocol=Protocol(**own), at=content.get("at", ""))


def _some(labels: Sequence[int]) -> str:
    return ", ".join(map(str, labels[:10])) + ", ..." * (len(labels) > 10)


def curve(evaluations: Iterable[Evaluation], metric: str, protocol: Protocol) -> list[tuple[int, float]]:
    """(step, value) of a metric by steps, of the evaluations by one protocol."""
    rows = {
        each.step: each.values[metric]
        for each in evaluations
        if each.step is not None and each.protocol == protocol and metric in each.values
    }
    return sorted(rows.items())


def steps_to_reach(points: Sequence[tuple[int, float]], metric: str, value: float) -> float | None:
    """The step at which a curve first is as good as `value`, between its points by a line; None where it never is.

    At the first point it is that point's step: what came before was not measured.
    """
    sign = direction(metric)
    before: tuple[int, float] | None = None
    for step, reached in points:
        if sign * reached >= sign * value:
            if before is None or reached == before[1]:
                return float(step)
            return before[0] + (step - before[0]) * (value - before[1]) / (reached - before[1])
        before = step, reached
    return None


def best(evaluations: Sequence[Evaluation], metric: str) -> Evaluation:
    """The evaluation with the best value of a metric; the first of several."""
    return max(evaluations, key=lambda each: direction(metric) * each.values[metric])
