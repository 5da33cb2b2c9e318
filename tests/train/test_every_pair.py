"""Every method and objective alone, and every pair, trains, or is refused because the two contradict each other.

All are taken from the registries (`tests.helpers.parts`), so a new one is here at once. A pair that fails for another
reason (a name, a shape) is mended, not listed.
"""

import math
import re
from pathlib import Path

import pytest
import torch

from dit_fast.methods import METHODS
from dit_fast.models import new_model
from dit_fast.runs import read_config
from dit_fast.train.__main__ import main
from tests.helpers.parts import cells, settings
from tests.helpers.toy_runs import arguments, rows, tensors

# The contradiction, as it is told to the user. A cell that trains must not be here.
REFUSED: dict[tuple[str, ...], str] = {
    (
        "ddpm",
        "reg",
    ): "objective=ddpm samples no class token: each step would need a variance for it, which the model does "
    "not predict; set model.class_token=0, or objective=flow",
    ("structure_guidance", "self_transcendence"): "structure_guidance is the first stage of self_transcendence, whose "
    "second trains without it; set methods=self_transcendence (methods.self_transcendence.stage1_* are its settings)",
}
REFUSED |= {
    ("repa_e", "self_transcendence"): "repa_e moves the latents while it trains, and the frozen teacher of "
    "self_transcendence knows those of another autoencoder; remove one of them"
}
NOISE = (
    "contrastive_flow with {}: the noise of another sample says nothing of its image, and to be far from it is only to "
    "be longer; set objective=flow objective.prediction=velocity, or x"
)
MEAN = {
    "internal_guidance": "internal_guidance teaches a second head the velocity at one time; a mean velocity "
    "(model.times=2) has its guidance in its target already; set objective=flow model.times=1, or leave "
    "internal_guidance out",
    "contrastive_flow": "contrastive_flow compares with the velocities of other samples, and the target of a mean "
    "velocity (model.times=2) holds the model's own derivative at the sample; set objective=flow model.times=1, or "
    "leave contrastive_flow out",
}
REFUSED |= {("ddpm", "contrastive_flow"): NOISE.format("objective=ddpm")}
REFUSED |= {
    (name, "contrastive_flow"): NOISE.format(f"objective.prediction={prediction}")
    for name, prediction in (("score", "score"), ("noise", "noise"), ("vp", "noise"))
}
REFUSED |= {("mean_flow", method): reason for method, reason in MEAN.items()}
REFUSED |= {("improved_mean_flow", "contrastive_flow"): MEAN["contrastive_flow"]}
REFUSED |= {
    ("improved_mean_flow", "internal_guidance"): "velocity_head and auxiliary_depth are both a second output; set one"
}
MUST_TRAIN = [
    *(("diversedit", other) for other in ("repa", "repa_e", "reg", "sra", "self_transcendence", "dispersive")),
    *(("mean_flow", "diversedit"), ("ddpm", "diversedit"), ("sra", "dispersive"), ("repa", "reg")),
    *(("diversedit", other) for other in ("internal_guidance", "contrastive_flow", "layersync", "sra2")),
]


@pytest.fixture(scope="module")
def trained(token_shards, tmp_path_factory):
    """Trains a cell for two steps, once; (exit status, the folders of its runs)."""
    known: dict[tuple[str, ...], tuple[int, list[Path]]] = {}
    size = ("run.checkpoint_every=1", "engine.global_batch=4", "engine.micro_batch=4")

    def train(cell):
        if cell not in known:
            run = tmp_path_factory.mktemp("-".join(cell)) / "run"
            status = main(arguments(token_shards, run, *size, *settings(cell, steps=2)))
            known[cell] = status, sorted(path.parent for path in run.rglob("metrics.jsonl"))
        return known[cell]

    return train


def terms(run, name):
    """What the last row of a run says of the part of this name."""
    return {key for key in rows(run)[-1] if key == name or key.startswith(f"{name}/")}


@pytest.mark.parametrize("cell", cells(), ids="-".join)
def test_it_trains_or_contradicts_itself(cell, trained, capsys):
    status, runs = trained(cell)
    told = capsys.readouterr().err
    if cell in REFUSED:
        assert status == 2
        assert REFUSED[cell] in told
        assert not runs
        return
    assert status == 0, told
    assert runs
    for run in runs:
        assert len(rows(run)) == 2
        assert all(math.isfinite(value) for row in rows(run) for value in row.values()), rows(run)
        first, second = tensors(run, 1), tensors(run, 2)
        with torch.device("meta"):
            own = {f"model/{name}" for name in new_model(read_config(run / "config.json").model).state_dict()}
        heads = {name for name in second if name.startswith("model/")} - own
        still = [name for name in sorted(heads) if torch.equal(first[name], second[name])]
        # a hinge loss of logits below 1 on both sides says nothing of what is added to all of them
        assert [name for name in still if not re.fullmatch(r"model/discriminator\.\d+\.bias", name)] == []
    for name in set(cell) & METHODS.keys():
        alone, beside = (
            {key for run in folders for key in terms(run, name)} for folders in (trained((name,))[1], runs)
        )
        assert alone
        assert alone == beside


def test_what_must_go_together_is_not_refused():
    assert not {frozenset(cell) for cell in REFUSED} & {frozenset(cell) for cell in MUST_TRAIN}
    assert set(REFUSED) <= set(cells())
