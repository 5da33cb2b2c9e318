"""The diversity loss on every device at hand."""

import pytest

from dit_fast import ops
from tests.helpers.cases import loop_over
from tests.helpers.devices import STREAM, TOLERANCE, check_no_wait, check_values_and_gradients

BLOCKS = [STREAM] * 5


def diversity(pairs, variant):
    return lambda *features: (ops.diversity_loss(features, pairs, variant).total,)


def tapped(*features):
    taps = ops.DiversityTaps()
    onward = [taps.tap(x) for x in features]
    return (taps.loss("all").total, *onward)


CASES = {
    "all pairs": (diversity("all", "release"), BLOCKS),
    "XL": (diversity("all", "release"), [(1, 67, 1152)] * 28),
    "paper, two pairs": (diversity([(0, 1), (4, 2)], "paper"), BLOCKS),
    "taps": (tapped, BLOCKS),
}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", list(CASES))
def test_values_and_gradients(name, dtype, device):
    check_values_and_gradients(*CASES[name], dtype, device)


@loop_over("name", list(CASES))
def test_no_wait_for_the_device(name, device):
    check_no_wait(*CASES[name], device)
