"""All that a report says about one run: what it logged, what it draws, what its blocks do."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dit_fast.analysis.blocks import BlockStudy, Inputs, study_blocks
from dit_fast.checkpoint.run import load_run
from dit_fast.data import LatentDataset
from dit_fast.methods import METHODS
from dit_fast.models.registry import kind
from dit_fast.objectives import OBJECTIVES
from dit_fast.options import to_dict
from dit_fast.report.metrics import Metrics, read_metrics
from dit_fast.report.reference import Verdict, find_verdict
from dit_fast.sampling.images import sample_images
from dit_fast.sampling.options import SampleOptions
from dit_fast.sampling.samples import FILE_NAME, Samples
from dit_fast.world import single

IMAGES = 256  # at most, that blocks are compared on


class Curve(NamedTuple):
    """What is drawn of an objective: a column of the log, its axis, and what to know about it."""

    column: str
    label: str
    text: str


CURVES = {
    "flow": Curve(
        "flow",
        "flow-matching loss",
        "The flow-matching loss is the mean squared error of the predicted {}. It falls fast, then flattens "
        "well above zero, because noise cannot be foreseen; samples go on improving while it barely moves.",
    ),
    "mean_flow": Curve(
        "mean_flow/squared_error",
        "squared error of the mean velocity",
        "The mean-flow loss is normalised to be near 1; this is the squared error before that, summed over a latent. "
        "Its target moves with the model, so that it need not fall while samples improve.",
    ),
    "improved_mean_flow": Curve(
        "improved_mean_flow/squared_error",
        "squared error of the velocity",
        "The loss is normalised to be near 1 for each output; this is the squared error before that, of the velocity "
        "that the mean one implies, summed over a latent. It falls fast, then flattens well above zero, because noise "
        "cannot be foreseen.",
    ),
    "ddpm": Curve(
        "ddpm/mse",
        "squared error of the predicted noise",
        "The mean squared error of the predicted noise, the larger part of DDPM's loss; the other trains the variance. "
        "It falls fast, then flattens well above zero; samples go on improving while it barely moves.",
    ),
}
PREDICTED = {"velocity": "velocity", "score": "score times sigma", "noise": "noise", "x": "clean latent"}
WEIGHTED = {
    "none": "",
    "velocity": ", weighted as an error of the velocity",
    "likelihood": ", weighted as the likelihood bound asks",
}


@dataclass(frozen=True)
class RunStory:
    """One run and the data set it was trained on. `name` is what captions call it."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    metrics: Metrics
    samples: Samples
    blocks: BlockStudy
    dataset: LatentDataset
    verdict: Verdict

    @property
    def steps(self) -> int:
        return int(self.metrics.rows[-1]["step"])

    @property
    def curve(self) -> Curve:
        objective = self.config["objective"]
        name, what = objective["name"], PREDICTED[objective.get("prediction", "velocity")]
        found = CURVES.get(name, Curve(name, name, ""))
        return found._replace(text=found.text.format(what + WEIGHTED[objective.get("weighting", "none")]))


def read_story(folder: Path, like: Samples | None = None, data: str | Path | None = None) -> RunStory:
    """Reads a run folder, draws samples unless RUN/samples.npz holds those of its weights, and studies its blocks.

    like: samples of another run that these stand beside: they are of the same classes, and kept ones are shown only
    where they were drawn alike. data: where the data set lies now, if it moved.
    """
    metrics, loaded = read_metrics(folder), load_run(folder)
    dataset, path = loaded.dataset(data), folder / FILE_NAME
    kept = Samples.load(path) if path.is_file() else None
    alike = like is None or (
        kept is not None and (kept.labels.tolist(), kept.text) == (like.labels.tolist(), like.text)
    )
    if kept is not None and kept.step == loaded.step and alike:
        drawn = kept
    else:
        classes = tuple(dict.fromkeys(like.labels.tolist())) if like else ()
        drawn = Samples.join(sample_images(loaded, SampleOptions(classes=classes), single(), dataset))
    count = min(IMAGES, len(dataset))
    blocks = study_blocks(loaded, Inputs(dataset, count, count, count), kernels=("linear",))
    config, verdict = to_dict(loaded.config), find_verdict(metrics, loaded.config, dataset.info)
    return RunStory(run_name(config), folder, config, metrics, drawn, blocks, dataset, verdict)


def _alike(samples: Samples, others: Samples) -> bool:
    return (samples.labels.tolist(), samples.text) == (others.labels.tolist(), others.text)


def run_name(config: Mapping[str, Any]) -> str:
    """Its objective, where it is not the usual one, and its methods, or which plain model it is."""
    objective = [config["objective"]["name"]] if config["objective"]["name"] != "flow" else []
    titles = [OBJECTIVES[name].title for name in objective] + [METHODS[name].title for name in config["methods"]]
    model, wiring = kind(config["model"]["name"]), config["model"].get("skip_wiring", "off")
    return " + ".join(titles) or (f"plain {model}" if wiring == "off" else f"{model} with long skips")
