"""Two cells of the matrix of methods and pairs, drawn with a seed; `make matrix` tries all of them."""

import json

import pytest

from tests import matrix
from tests.helpers.no_gpu import no_gpu  # noqa: F401


@pytest.mark.launch
def test_two_cells_survive_a_kill_with_equal_bits(capsys):
    assert matrix.main(["--count", "2", "--seed", "3"]) == 0, capsys.readouterr().out
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["trained"] + found["refused"] == 2
    assert found["trained"] >= 1


def test_cells_recorded_before_keep_their_commit_and_others_are_told_as_not_run():
    sra = {"parts": ["sra"], "outcome": "refused", "reason": "why"}
    earlier = {"commit": "a", "dirty": False, "written": "then", "seed": 0, "cells": [{"parts": ["flow"]}, sra]}
    assert matrix.kept(earlier, [("flow",)]) == [
        {"commit": "a", "dirty": False, "written": "then", "seed": 0, **sra},
    ]
    own = {"parts": ["sra"], "commit": "b", "dirty": True, "written": "later", "seed": 7}
    assert matrix.kept({"versions": {}, "cells": [own]}, []) == [own]
    lines = matrix.table({"cells": [{"parts": ["repa"], "outcome": "trained"}, sra]}).splitlines()
    cells = {line.split("`")[1]: line.split("|")[2].strip() for line in lines if line.startswith("| `")}
    assert (cells["repa"], cells["sra"], cells["jit"]) == ("yes", "no (1)", "not run")
    assert lines[-1] == "1. `why`"
