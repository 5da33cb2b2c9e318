"""The memory planner: against a GPU's allocator, against tensors with values, and its search."""

import contextlib
import json
from pathlib import Path

import pytest
import torch

from dit_fast.errors import ConfigError, UserError
from dit_fast.recipes import load
from dit_fast.train import memory
from dit_fast.train.__main__ import main
from dit_fast.train.memory import Live, Planner, report
from dit_fast.train.optim import STATES, build_optimizer, init_states

H200 = Path(__file__).parents[2] / "benchmarks/results/nvidia-h200"
GIB = 2**30
SMALL = ("model.input_size=8", "model.in_channels=4", "model.num_classes=10", "data.path=")


def planner(recipe="quickstart-sit", *changes, **options):
    return Planner(load(recipe, [*SMALL, *changes]), **options)


@pytest.mark.parametrize(
    ("file", "case", "recipe", "batch"),
    [
        ("step-xl-2-b32-bf16.json", "XL/2 b32 bf16", "diversedit-xl2-256", 32),
        ("first_run/step_c4cc395.json", "B/2 b32 bf16", "diversedit-b2-256", 32),
        ("first_run/step_c4cc395.json", "B/2 b256 bf16", "diversedit-b2-256", 256),
    ],
)
def test_a_step_takes_what_a_gpu_has_allocated(file, case, recipe, batch):
    """max_memory_allocated of an H200 beyond weights and states, recorded by the benchmark of whole steps; in the first
    run weights were cast in every step and GELU's results computed again."""
    costs = next(each["costs"] for each in json.loads((H200 / file).read_text())["cases"] if each["name"] == case)
    first = file.startswith("first_run")
    changes = ["engine.activation_checkpointing=gelu"] if first else []
    planned = Planner(load(recipe, ["methods.diversedit.pairs=all", *changes]))
    counted = planned.step(batch).whole + (planned.copies if first else 0)
    assert counted == pytest.approx(costs["dit_fast, all pairs"]["peak_memory_bytes"], rel=0.05)


@pytest.mark.parametrize("which", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tensors_without_values_take_what_those_with_values_take(which, precision, monkeypatch):
    monkeypatch.setattr(memory, "on_cuda", contextlib.nullcontext)  # implementations that run here
    changes = (f"engine.precision={precision}", f"engine.activation_checkpointing={which}")
    expected = planner("quickstart-diversedit-repa", *changes).step(16)
    monkeypatch.setattr(memory, "one_mode", contextlib.nullcontext)
    found = planner("quickstart-diversedit-repa", *changes).step(16)
    assert found.whole == pytest.approx(expected.whole, rel=0.01)
    assert found.but_gradients == pytest.approx(expected.but_gradients, rel=0.01)


def test_what_is_recomputed_is_not_kept_and_a_bf16_stream_halves():
    def bytes_of(*changes):
        planned = planner("quickstart", "engine.precision=bf16", *changes)
        return planned.step(128).but_gradients - planned.step(64).but_gradients

    full, selective, gelu, none = (
        bytes_of(f"engine.activation_checkpointing={how}") for how in ("full", "selective", "gelu", "none")
    )
    assert selective < 0.97 * gelu < 0.95 * none
    assert full < 0.55 * selective  # the modulations of all blocks are kept: one product made them
    assert selective < 0.9 * none
    assert bytes_of("model.residual_dtype=bf16") < 0.95 * none


def test_states_are_those_of_the_optimizer():
    planned = planner()
    counted = planned.memory(1)
    optimizer = build_optimizer(planned.config.optimizer, planned.parameters, "cpu")
    with memory.one_mode():
        init_states(optimizer)
    states = {kind: sum(state[kind].nbytes for state in optimizer.state.values()) for kind in STATES}
    assert counted.moments == states["exp_avg"] + states["exp_avg_sq"]
    assert counted.average == states["ema"] == counted.weights


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    planned = planner()
    for ranks, adds_up, wanted in ((1, False, 1), (1, False, 300), (1, True, 37), (2, False, 37)):
        planned.ranks = ranks
        limit = planned.memory(wanted, adds_up).total
        largest = planned.largest(limit, adds_up)
        assert planned.memory(largest, adds_up).total <= limit < planned.memory(largest + 1, adds_up).total
        assert largest >= wanted
    assert planned.largest(10**6, adds_up) == 0


def test_shares_of_ranks_shrink_with_the_stage():
    totals = [planner("quickstart-sit", f"engine.zero_stage={stage}", ranks=8).memory(1) for stage in (0, 1, 2, 3)]
    assert totals[1].moments == -(-totals[0].moments // 8)
    assert totals[1].gradients == totals[0].weights == 8 * totals[2].gradients


def test_live_bytes_fall_when_a_tensor_goes():
    before = torch.zeros(4096)
    with Live() as live:
        view = before.view(64, 64)
        x = torch.zeros(1024)
        y = x.view(32, 32)  # the same storage
        assert live.now == 4096
        z = x + 1
        assert live.now == live.peak == 8192
        del x, y, view
        assert live.now == 4096
        del z
    assert (live.now, live.peak) == (0, 8192)


def test_the_command_names_the_largest_and_what_divides(capsys):
    assert main(["diversedit-b2-256", "--plan", "40"]) == 0
    text = capsys.readouterr().out
    assert "with engine.micro_batch=256 of 256 samples in a step of a rank" in text
    assert "the largest micro-batch in 40 GiB is " in text
    assert main(["diversedit-b2-256", "--plan", "17"]) == 0
    assert "with engine.micro_batch=128 of 256" in capsys.readouterr().out
    assert main(["diversedit-b2-256", "--plan", "2"]) == 0
    assert "no micro-batch fits in 2 GiB: one sample takes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "gib", "ranks", "message"),
    [
        ((), 0, 1, "--plan 0 --ranks 1: give a device's memory"),
        ((), 8, 7, "does not divide over 7 ranks"),
        (("model.in_channels=0",), 8, 1, "model.in_channels is not set, and there is no data"),
        (("methods=repa_e",), 8, 1, r"--plan cannot count the weights of methods\.repa_e\.vae"),
        (
            ("methods=repa", "methods.repa.encoders=x:y"),
            8,
            1,
            r"--plan cannot count the weights of methods\.repa\.encoders",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_line(changes, gib, ranks, message):
    with pytest.raises(UserError, match=message) as caught:
        report(load("quickstart-sit", [*SMALL, *changes]), gib, ranks)
    assert isinstance(caught.value, ConfigError)
