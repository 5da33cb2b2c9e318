"""Steps of foreign models, patched and unpatched, in a small form."""

import pytest

from dit_fast.benchmarks import patched
from tests.helpers.published_models import Transformer, inputs, loss_of


def test_every_model_is_measured_in_both_precisions_with_what_was_replaced(monkeypatch):
    small = Transformer("sit", depth=1, qk_norm=True)
    monkeypatch.setattr(patched, "models", lambda: [("small", small, lambda model: loss_of(model(*inputs())))])
    found = patched.measure(seconds=0.0, samples=1)["models"]
    assert list(found) == ["small, fp32", "small, bf16"]
    for each in found.values():
        assert {side: len(times) for side, times in each["samples_s"].items()} == {"unpatched": 1, "patched": 1}
        assert each["paired_speedup"][1] == pytest.approx(
            each["samples_s"]["unpatched"][0] / each["samples_s"]["patched"][0], rel=1e-6
        )
    assert any(line.startswith("gelu_mlp") for line in found["small, bf16"]["report"])
