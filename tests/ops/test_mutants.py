"""The mutants' texts are there, their record is of them and of nothing else, and the gates still kill six of them."""

import json
import os

import pytest

from tests.ops.mutants import GATES, RECORD, ROOT, copy, killer, missing, mutants, survivors, table

MUTANTS = {f"{mutant.family}: {mutant.name}": mutant for mutant in mutants()}
# Cheap ones, one per kind of fault: of the two that gates did not see, of every gate that takes seconds.
QUICK = {
    "gelu: column of 32 bits": "rules",
    "adaln: alignment ignores the step between samples": "interpreter",
    "qk_norm: alignment ignores every step": "interpreter",
    "repa_cosine: one ticket for all streams": "interpreter",
    "gelu: tail by subtraction": "interpreter",
    "shared: truncated on the GPU alone": "semantics",
}


def test_every_text_is_there_once_and_every_gate_has_a_name():
    for name, mutant in MUTANTS.items():
        assert mutant.source() != (ROOT / mutant.file).read_text(), name
        assert mutant.equivalent or {gate.partition(": ")[0] for gate in mutant.gates} <= GATES.keys(), name
    assert len(MUTANTS) == len(mutants())


def test_the_record_is_of_these_mutants():
    for entry in json.loads(RECORD.read_text()):
        assert f"{entry['family']}: {entry['name']}" in MUTANTS, f"{entry['name']}: python -m tests.ops.mutants"


def test_the_page_shows_the_record():
    assert table(json.loads(RECORD.read_text())) in (ROOT / "docs/kernel-proofs.md").read_text()


def test_table_and_survivors():
    entries = [
        {"family": "a", "name": "x", "killed_by": "rules"},
        {"family": "a", "name": "y", "killed_by": None},
        {"family": "b", "name": "z", "killed_by": None, "equivalent": "the same"},
        {"family": "b", "name": "v", "killed_by": "semantics"},
    ]
    assert table(entries).splitlines()[2:] == [
        "| a | 2 | 0 | 1, 50 % | 1 |  |",
        "| b | 2 | 1 | 1, 100 % |  | 1 |",
        "| all | 4 | 1 | 2, 67 % | 1 | 1 |",
    ]
    assert survivors(entries) == ["a: y"]


def test_a_record_of_an_earlier_source_does_not_count():
    first = mutants()[0]
    entry = {"family": first.family, "name": first.name, "source": first.digest(), "killed_by": "rules"}
    assert first not in missing([entry])
    assert first in missing([entry | {"source": "another"}])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    place = tmp_path_factory.mktemp("mutants")
    copy(place)
    return place


@pytest.mark.kernels
@pytest.mark.parametrize("name", QUICK)
def test_a_gate_kills(name, request):
    if os.environ.get("PROVE") != "all":
        pytest.skip("`make test-kernels` runs the mutants")
    checkout = request.getfixturevalue("checkout")
    assert killer(MUTANTS[name], checkout) == QUICK[name]
