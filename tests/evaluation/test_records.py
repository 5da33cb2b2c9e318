"""Where results go: lines with their protocol, read back; curves, and the step at which one reaches a value."""

import json
from dataclasses import asdict, replace

import pytest

from dit_fast.errors import UserError
from dit_fast.evaluation.records import (
    FILE_NAME,
    Evaluation,
    Protocol,
    append_evaluation,
    best,
    curve,
    direction,
    read_evaluations,
    steps_to_reach,
)

PROTOCOL = Protocol(
    network="Inception (ADM)", network_identity="ab", resizing="bilinear to 299", metrics="", reference="ref.npz",
    reference_identity="cd", reference_count=None, count=50_000, size="256x256", labels="random",
    sampler="heun, 20 steps", num_steps=20, nfe=39, guidance=1.8, guidance_interval=(0.0, 0.7), seed=0,
    weights="ema 0.9999", precision="fp32",
    decoder="kl-vae 12",
)  # fmt: skip


def test_a_number_is_read_back_with_its_protocol(tmp_path):
    first = Evaluation(step=10, values={"FID": 3.5}, protocol=PROTOCOL)
    append_evaluation(tmp_path, first)
    append_evaluation(tmp_path, Evaluation(step=10, values={"IS": 9.0}, protocol=PROTOCOL))
    other = Evaluation(step=10, values={"FID": 4.0}, protocol=replace(PROTOCOL, guidance=1.0))
    append_evaluation(tmp_path, other)
    together, alone = read_evaluations(tmp_path)
    assert together.values == {"FID": 3.5, "IS": 9.0}
    assert together.protocol == PROTOCOL
    assert alone == other
    for part in (
        "50000 images",
        "random labels",
        "NFE 39",
        "guidance 1.8 for t in [0, 0.7]",
        "reference ref.npz",
        "ema",
    ):
        assert part in PROTOCOL.text()
    said = replace(PROTOCOL, sampler="heun, 20 steps, guidance 1.8 for t in [0, 0.7]").text()
    assert said.count("guidance") == 1


def test_a_cut_line_hides_no_other(tmp_path):
    append_evaluation(tmp_path, Evaluation(step=1, values={"FID": 1.0}, protocol=PROTOCOL))
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"step": 2, "val')
    append_evaluation(tmp_path, Evaluation(step=3, values={"FID": 3.0}, protocol=PROTOCOL))
    assert [each.step for each in read_evaluations(tmp_path)] == [1, 3]


VALUES = '{"step": STEP, "values": {"FID": VALUE}, "protocol": ' + json.dumps(asdict(PROTOCOL)) + "}"
FOREIGN = [
    "[]",
    "{}",
    '{"step": 1, "values": {}, "protocol": {"count": 3}}',
    VALUES.replace("STEP", "1").replace("VALUE", "NaN"),
    VALUES.replace("STEP", '"last"').replace("VALUE", "3"),
]


@pytest.mark.parametrize("line", FOREIGN)
def test_a_foreign_line_is_named(tmp_path, line):
    (tmp_path / FILE_NAME).write_text(line + "\n")
    with pytest.raises(UserError, match=r"evaluations\.jsonl: line 1 is no evaluation"):
        read_evaluations(tmp_path)


def test_a_value_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(UserError, match="FID is nan"):
        append_evaluation(tmp_path, Evaluation(step=1, values={"FID": float("nan")}, protocol=PROTOCOL))


def test_steps_to_reach_lie_between_points_of_one_protocol():
    fid = {100: 50.0, 300: 20.0, 200: 40.0}
    rows = [Evaluation(step=step, values={"FID": value}, protocol=PROTOCOL) for step, value in fid.items()]
    rows.append(Evaluation(step=250, values={"FID": 0.0}, protocol=replace(PROTOCOL, count=10)))
    points = curve(rows, "FID", PROTOCOL)
    assert points == [(100, 50.0), (200, 40.0), (300, 20.0)]
    assert steps_to_reach(points, "FID", 30.0) == 250.0
    assert steps_to_reach(points, "FID", 60.0) == 100.0
    assert steps_to_reach(points, "FID", 10.0) is None
    assert steps_to_reach([(1, 2.0), (3, 4.0)], "IS", 3.0) == 2.0


def test_the_best_of_a_sweep_follows_the_metric():
    rows = [Evaluation(step=1, values={"FID": v, "recall": v}, protocol=PROTOCOL) for v in (3.0, 1.0, 2.0)]
    assert best(rows, "FID").values["FID"] == 1.0
    assert best(rows, "recall").values["recall"] == 3.0
    assert [direction(name) for name in ("FID", "FD-EffLite0", "IS", "precision-EffLite0")] == [-1, -1, 1, 1]
