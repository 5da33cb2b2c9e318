"""Four cells of the matrix of methods and pairs, drawn with a seed; `make matrix` tries all of them."""

import json

import pytest

from tests import matrix


@pytest.mark.launch
def test_four_cells_survive_a_kill_with_equal_bits(capsys):
    assert matrix.main(["--count", "4", "--seed", "3"]) == 0, capsys.readouterr().out
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["trained"] + found["refused"] == 4
    assert found["trained"] >= 2
