"""What a sweep runs: names, seeds, folders, and refusals before anything is started."""

import re

import pytest

from dit_fast import cli
from dit_fast.sweep.plan import from_words, members, read_sweep
from tests.helpers.cases import loop_over, refused
from tests.helpers.no_gpu import no_gpu  # noqa: F401

FILE = """
seeds = [3, 4]
changes = ["run.steps=5"]
[runs]
plain = "quickstart-sit"
all = "quickstart methods.diversedit.pairs=all run.steps=6"
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(FILE)
    return path


def test_names_times_seeds_in_folders_of_their_own(file, shards, tmp_path):
    found = members(from_words([str(file), f"data.path={shards}", "run.steps=7"]), tmp_path)
    assert [member.label for member in found] == ["plain/seed3", "all/seed3", "plain/seed4", "all/seed4"]
    run = found[3].runs[0]
    assert (run.run.seed, run.data.seed, run.run.noise_seed, run.run.steps) == (4, 4, 4, 7)
    assert run.run.dir == str(tmp_path / "all/seed4")
    assert run.model.in_channels == 12  # of the data set
    assert found[0].arguments[0] == "quickstart-sit"
    assert not found[0].done()


def test_a_seed_that_is_given_holds_in_every_run(shards, tmp_path):
    sweep = from_words(["quickstart-sit", f"data.path={shards}", "run.seed=9", "data.seed=8"])
    (one,) = members(sweep, tmp_path)
    assert (one.runs[0].run.seed, one.runs[0].data.seed, one.runs[0].run.noise_seed) == (9, 8, 0)


@loop_over(
    ("text", "said"),
    [
        ("seeds = [0", "not TOML"),
        ("[run]\na = 'x'", "unknown key 'run'"),
        ("seeds = [0]", r"needs a table \[runs\]"),
        ("seeds = [true]\n[runs]\na = 'quickstart'", "whole numbers"),
        ("changes = 'a=b'\n[runs]\na = 'quickstart'", "list of"),
        ('[runs]\na = "quickstart \'open"', r"No closing quotation in \[runs\]"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, said):
    path = tmp_path / "x.toml"
    path.write_text(text)
    message = refused(read_sweep, path)
    assert message.startswith(str(path))
    assert re.search(said, message), message


@loop_over(
    ("words", "options", "said"),
    [
        (["quickstart", "quickstart"], {}, "two runs would have the name 'quickstart'"),
        (["run.steps=1"], {}, "name recipes"),
        (["quickstart", "run.dir=x"], {}, "name OUT with --out"),
        (["quickstrat"], {}, "run 'quickstrat' of the sweep: unknown recipe"),
        (["quickstart", "run.steps=0"], {}, "run.steps=0 must lie in"),
        (["quickstart", "data.path=/nowhere"], {}, "run 'quickstart' of the sweep: /nowhere"),
        (["quickstart"], {"only": ["b"]}, "--only b: no run has this name; valid: quickstart"),
        (["quickstart"], {"processes": 5}, "does not divide over 5 ranks"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_runs(tmp_path, words, options, said):
    assert said in refused(lambda: members(from_words(words), tmp_path, **options))


def test_a_dry_run_prints_commands_and_writes_nothing(file, shards, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["sweep", str(file), f"data.path={shards}", "--out", str(out), "--seeds", "0,1", "--dry-run"]
    assert cli.main([*words, "--only", "plain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [["dit-fast", "train", "quickstart-sit"]] * 2
    assert f"run.dir={out / 'plain' / 'seed1'}" in lines[1].split()
    assert cli.main([*words, "--processes", "2"]) == 0
    assert capsys.readouterr().out.startswith("deepspeed --num_gpus 2 --master_port ")
    assert not out.exists()
    assert cli.main([*words[:-3], "--seeds", "0,0"]) == 2
    assert "give each seed once" in capsys.readouterr().err
