"""Row statistics travel with the stream and change nothing; the next linear map gets its own dtype."""

import pytest
import torch

from dit_fast import _C
from dit_fast.models import Taps, build_model
from dit_fast.models import sit as sit_file
from dit_fast.nn import block as block_file
from dit_fast.nn.block import Block
from dit_fast.nn.long_skip import SkipNorm
from dit_fast.ops import RowStatistics, row_statistics
from dit_fast.ops.autocast import linear_dtype
from tests.helpers.golden import assert_close

needs_library = pytest.mark.skipif(_C.unavailable() is not None, reason=f"{_C.unavailable()}")


def model(wiring, recompute="none", **options):
    torch.manual_seed(0)
    sizes = {"input_size": 8, "hidden_size": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    made = build_model("SiT-S/2", **sizes, skip_wiring=wiring, **options)
    made.activation_checkpointing = recompute
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.2)
    return made


def run(made, autocast=False):
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(3, 4, 8, 8, generator=generator), torch.rand(3, generator=generator)
    seen = []

    class Seeing:
        def tap(self, feature, stats):
            seen.append((feature.detach(), stats))
            return feature.view_as(feature)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        taps = Taps(collectors={"seeing": (Seeing(), frozenset(range(4)))})
        v = made(x, t, torch.tensor([0, 1, 4]), taps=taps)
    loss = v.float().square().mean() + sum(f.float().square().mean() for f in taps.features.values())
    grads = torch.autograd.grad(loss, [p for p in made.parameters() if p.requires_grad])
    return [v.detach(), *grads], seen


@needs_library
@pytest.mark.parametrize("wiring", ["off", "input", "output"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_they_are_those_of_the_stream_and_change_nothing(wiring, recompute, monkeypatch):
    with_stats, seen = run(model(wiring, recompute=recompute))
    fused = {"off": (), "input": (), "output": (2, 3)}[wiring]
    for index, (feature, stats) in enumerate(seen):
        assert (stats is None) == (index in fused)
        if stats is not None:
            for ours, expected in zip(stats, row_statistics(feature.double()), strict=True):
                assert_close(ours, expected, 1e-5)
                assert not ours.requires_grad
    monkeypatch.setattr(block_file, "returns_statistics", lambda x: False)
    without, seen = run(model(wiring, recompute=recompute))
    assert all(stats is None for _, stats in seen)
    for ours, expected in zip(with_stats, without, strict=True):
        assert_close(ours, expected, 1e-5)


@needs_library
def test_long_skips_and_norms_believe_them(monkeypatch):
    """A wrong promise shows, so they are really used."""
    made = Block(8, 2)
    torch.nn.init.normal_(made.adaLN_modulation[1].weight)
    x, c = torch.randn(2, 3, 8), torch.randn(2, 8)
    stats = row_statistics(x)
    assert_close(made(x, c, stats)[0], made(x, c)[0], 1e-5)
    assert not torch.equal(made(x, c, stats._replace(mean=stats.mean + 1))[0], made(x, c)[0])


@needs_library
def test_those_of_the_first_stream_serve_the_first_block_and_the_last_long_skip(monkeypatch):
    """Taken where a kernel does it; here by the reference. A wrong promise to either shows."""
    without, _ = run(model("input"))
    skips = []
    forward = SkipNorm.forward
    monkeypatch.setattr(SkipNorm, "forward", lambda *given: skips.append(given[5]) or forward(*given))
    monkeypatch.setattr(sit_file, "statistics_by_kernel", lambda x: row_statistics(x, "torch"))
    with_stats, _ = run(model("input"))
    assert all(stats is not None for stats in skips)
    for ours, expected in zip(with_stats, without, strict=True):
        assert_close(ours, expected, 1e-5)
    wrong = lambda x: RowStatistics(row_statistics(x, "torch").mean + 1, row_statistics(x, "torch").variance)  # noqa: E731
    monkeypatch.setattr(sit_file, "statistics_by_kernel", wrong)
    assert not torch.allclose(run(model("input"))[0][0], without[0], rtol=1e-3)


@pytest.mark.parametrize("residual", ["fp32", "autocast"])
def test_the_output_dtype_under_autocast_changes_no_bit(residual, monkeypatch):
    narrow, _ = run(model("output", residual_dtype=residual), autocast=True)
    monkeypatch.setattr(block_file, "linear_dtype", lambda x, own: own)
    monkeypatch.setattr("dit_fast.nn.final_layer.linear_dtype", lambda x, own: own)
    wide, _ = run(model("output", residual_dtype=residual), autocast=True)
    assert torch.equal(narrow[0], wide[0])
    for ours, expected in zip(narrow[1:], wide[1:], strict=True):
        assert_close(ours, expected, 2e-2)  # the gradient of the cast is rounded to bf16, too


def test_dtype_of_the_next_linear_map():
    x = torch.zeros(1)
    assert linear_dtype(x, x.dtype) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_dtype(x, x.dtype) == torch.bfloat16
        assert linear_dtype(x, torch.float64) == torch.float64
