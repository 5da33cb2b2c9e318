"""Rates below 1 keep two digits in every place that prints one."""

import pytest

from dit_fast.display import percent, rate
from dit_fast.train.journal import _summary


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12345.6, "12,346"),
        (9.5, "10"),
        (3.14, "3.1"),
        (0.45, "0.45"),
        (0.00421, "0.0042"),
        (0.0, "0"),
        (float("nan"), "-"),
    ],
)
def test_rate(value, text):
    assert rate(value) == text


@pytest.mark.parametrize(("share", "text"), [(0.129, "12.9%"), (0.00421, "0.42%"), (2e-5, "0.002%"), (0.0, "0.0%")])
def test_percent(share, text):
    assert percent(share) == text


def test_progress_line_of_a_slow_run():
    row = {"loss": 1.0, "samples_per_s": 0.0421, "mfu": 0.00012, "skipped": 0}
    assert _summary(row) == "loss 1.0000  0.042 samples/s  mfu 0.012%"
