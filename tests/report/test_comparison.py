"""What `dit-fast compare` says of runs, and what it refuses to say."""

import json
import math
from dataclasses import replace

import pytest

from dit_fast.cli import main
from dit_fast.errors import UserError
from dit_fast.evaluation.records import Evaluation, Protocol, append_evaluation
from dit_fast.options import to_dict
from dit_fast.recipes import load
from dit_fast.report.comparison import compare

PROTOCOL = Protocol(
    network="EffLite0", network_identity="ab", resizing="bicubic 224", metrics="", reference="shards",
    reference_identity="cd", reference_count=60000, count=1000, size="32x32", labels="balanced", sampler="heun",
    num_steps=20, nfe=39, guidance=1.0, seed=0, weights="ema 0.999", precision="fp32", decoder="pca",
)  # fmt: skip


@pytest.fixture
def make(tmp_path):
    def run(name, values, *assignments, start="quickstart-sit", step=100, **protocol):
        folder = tmp_path / name
        folder.mkdir()
        config = load(start, ["data.path=shards", f"run.dir={folder}", *assignments])
        (folder / "config.json").write_text(json.dumps(to_dict(config)))
        for seed, value in enumerate(values):
            how = replace(PROTOCOL, **{"seed": seed, **protocol})
            append_evaluation(folder, Evaluation(step=step, values={"FD-EffLite0": value}, protocol=how))
        return folder

    return run


def three(make, name, values, *assignments, **more):
    return [make(f"{name}{k}", [value], f"run.seed={k}", *assignments, **more) for k, value in enumerate(values)]


def test_mean_spread_and_interval_over_training_seeds(make):
    folders = three(make, "a", (10.0, 11.0, 12.0)) + three(make, "b", (8.0, 8.1, 8.2), start="quickstart")
    (found,) = compare(folders, by=["method"])
    assert [group.name for group in found.groups] == ["no method", "diversedit"]
    assert [group.mean for group in found.groups] == pytest.approx([11.0, 8.1])
    assert [group.sd for group in found.groups] == pytest.approx([1.0, 0.1])
    assert found.seeds == "run.seed"
    assert "model.skip_wiring" in found.other
    (gap,) = found.differences
    assert gap.relative == pytest.approx(-2.9 / 11)
    # scipy.stats.ttest_ind([8, 8.1, 8.2], [10, 11, 12], equal_var=False).confidence_interval(): freedom 2.04
    assert gap.interval == pytest.approx((-0.4863822, -0.0408906), abs=1e-5)
    assert gap.verdict == "better"


@pytest.mark.parametrize(
    ("one", "other", "verdict"),
    [
        ((10.0, 10.01, 10.02), (10.1, 10.11, 10.12), "inconclusive: less than 1.3%"),
        ((10.0, 11.0, 12.0), (9.0, 10.0, 11.5), "inconclusive: within the spread over seeds"),
        ((10.0, 10.1, 10.2), (12.0, 12.1, 12.2), "worse"),
        ((10.0, 10.1), (5.0, 5.1), "undecided: 2 seeds, 3 are needed"),
        ((10.0,), (5.0,), "undecided: 1 seed, 3 are needed"),
    ],
)
def test_better_is_said_only_where_the_runs_carry_it(make, one, other, verdict):
    folders = three(make, "a", one) + three(make, "b", other, "optimizer.lr=1e-3")
    (found,) = compare(folders)
    assert found.differences[0].group == "optimizer.lr=0.001"
    assert found.differences[0].verdict == verdict
    assert (found.differences[0].interval is None) == (len(one) == 1)


def test_nothing_is_a_share_of_zero(make, tmp_path, capsys):
    folders = three(make, "a", (0.0, 0.0, 0.0)) + three(make, "b", (0.1, 0.1, 0.1), start="quickstart")
    folders += three(make, "c", (0.0, 0.0, 0.0), start="quickstart-x")
    found = {each.group: each for each in compare(folders, by=["method", "objective"])[0].differences}
    shares = [(each.relative, each.verdict.partition(":")[0]) for each in found.values()]
    assert shares == [(None, "inconclusive"), (0.0, "inconclusive")]
    out = tmp_path / "out.json"
    assert main(["compare", *map(str, folders), "--by", "method", "--by", "objective", "--out", str(out)]) == 0
    assert "no share of 0: inconclusive" in capsys.readouterr().out
    assert "Infinity" not in out.read_text()


def test_draws_of_one_run_are_one_value(make):
    make("a", (1.0, 2.0, 6.0))
    folder = make("b", (5.0,), "optimizer.lr=1e-3").parent
    (folder / "deeper" / "exported").mkdir(parents=True)
    (folder / "deeper" / "exported" / "config.json").write_text('{"_class_name": "Transformer"}')  # is no run
    (folder / "b").rename(folder / "deeper" / "b")
    (found,) = compare([folder])  # a folder of runs stands for them
    assert [group.values for group in found.groups] == [(3.0,), (5.0,)]


def test_only_what_all_share_is_compared(make):
    a = make("a", (1.0,))
    b = make("b", (2.0,), "optimizer.lr=1e-3", guidance=1.5)
    with pytest.raises(UserError, match=r"no metric .* by one protocol \(.*a and .*b: guidance 1\.0 and 1\.5\)"):
        compare([a, b])
    append_evaluation(b, Evaluation(step=50, values={"FD-EffLite0": 4.0}, protocol=PROTOCOL))
    append_evaluation(a, Evaluation(step=50, values={"FD-EffLite0": 3.0}, protocol=PROTOCOL))
    (found,) = compare([a, b])
    assert (found.step, [group.mean for group in found.groups]) == (50, [3.0, 4.0])
    with pytest.raises(UserError, match="at step 70"):
        compare([a, b], step=70)


def test_what_is_refused(make, tmp_path):
    a, b = make("a", (1.0,)), make("b", (2.0,), "run.seed=1", "optimizer.lr=1e-3")
    with pytest.raises(UserError, match=r"runs of 'all' also differ in optimizer\.lr .*add --by optimizer\.lr"):
        compare([a, b], by=["method"])
    c = make("e", (2.0,), "model.depth=4", "optimizer.lr=1e-3", "optimizer.beta2=0.9", "model.hidden_size=64")
    with pytest.raises(UserError, match=r"model\.depth \(0 and 4\), .* and 1 more; add --by .* --by "):
        compare([a, c], by=["method"])
    with pytest.raises(UserError, match="equal seeds and configurations"):
        compare([a, make("c", (2.0,))])
    for given, named in (([tmp_path / "a"], "/a"), ([], "none")):
        with pytest.raises(UserError, match=f"needs two runs or more, and got .*{named}; name another"):
            compare(given)
    with pytest.raises(UserError, match="named twice"):
        compare([a, a])
    with pytest.raises(UserError, match=r"--by optimiser\.lr: no run has this key; did you mean 'optimizer\.lr'"):
        compare([a, b], by=["optimiser.lr"])
    with pytest.raises(UserError, match="no such group; there are"):
        compare([a, b], baseline="x")
    with pytest.raises(UserError, match="no run has it; there are FD-EffLite0"):
        compare([a, b], metrics=["FID"])
    (tmp_path / "b" / "evaluations.jsonl").unlink()
    with pytest.raises(UserError, match=r"holds no evaluation; run `dit-fast evaluate .*b`"):
        compare([a, b])
    with pytest.raises(UserError, match="neither a run nor a folder that holds runs"):
        compare([tmp_path / "nothing"])


def test_the_command_prints_and_writes(make, tmp_path, capsys):
    three(make, "a", (10.0, 10.1, 10.2))
    three(make, "b", (5.0, 5.1, 5.2), "optimizer.lr=1e-3")
    out = tmp_path / "out" / "compared.json"
    out.parent.mkdir()
    assert main(["compare", str(tmp_path), "--baseline", "optimizer.lr=0.001", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "FD-EffLite0 at step 100 (lower is better; spread over run.seed)" in shown
    assert "guidance 1" in shown  # never a number without its protocol
    (content,) = json.loads(out.read_text())
    assert content["differences"][0]["verdict"] == "worse"
    assert math.isclose(content["groups"][0]["mean"], 5.1)
