"""The small parts: guard, stop flag, metrics file, clock, and what rank 0 decides."""

import hashlib
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from dit_fast import files
from dit_fast.errors import UserError
from dit_fast.train.guard import Diverged, Guard
from dit_fast.train.lines import AppendedLines, truncate_lines
from dit_fast.train.part import TensorFile
from dit_fast.train.stop import StopRequest
from dit_fast.train.throughput import Clock, matmul_ceiling
from dit_fast.world import World

ALONE = World(0, 1, torch.device("cpu"))


def test_guard_counts_consecutive_skips_only():
    guard = Guard(newest=40, patience=3)
    for step, applied in enumerate([False, False, True, False, False], start=1):
        guard.after_step(step, torch.tensor(float(applied)))
    assert guard.skipped == 4
    with pytest.raises(Diverged, match="steps 4 to 6") as raised:
        guard.after_step(6, torch.zeros(()))
    assert raised.value.steps == (4, 6)
    assert "the newest checkpoint is step 40" in guard.advice()


class OnCuda(torch.Tensor):
    is_cuda = True


def test_guard_reads_a_devices_flags_one_interval_late():
    guard, seen = Guard(), []
    for step, flag in enumerate((1.0, 0.0, 1.0, 0.0, 0.0, 1.0), start=1):
        guard.after_step(step, torch.tensor(flag).as_subclass(OnCuda))
        if step % 2 == 0:
            guard._open = [each.as_subclass(torch.Tensor) for each in guard._open]  # no pinned memory on a CPU
            seen.append((guard.close_interval(step), guard.skipped))
    assert seen == [(0, 0), (2, 1), (4, 2)]
    guard.settle(6)
    assert guard.recent == [2, 4, 5]


def test_guard_names_a_value_that_is_not_finite():
    guard = Guard()
    guard.values(10, {"loss": 1.0})
    with pytest.raises(Diverged, match=r"alignment is nan in the interval that ends at step 20"):
        guard.values(20, {"loss": 1.0, "repa/alignment": float("nan")})
    assert "there is no checkpoint yet" in guard.advice()


def test_guard_goes_on_from_a_checkpoint():
    """A streak is a streak across restarts; of all earlier skips only the recent ones are kept."""
    guard = Guard(patience=4, batch=8)
    for step in range(1, 201):
        guard.after_step(step, torch.tensor(step not in (5, 150, 199, 200)))
    assert guard.recent == [150, 199, 200]
    again = Guard(newest=200, patience=4, skipped=4, recent=guard.recent, batch=8)
    assert again.in_a_row(200) == 2
    assert again.warning(200) is None  # reported before the restart
    again.after_step(201, torch.zeros(()))
    with pytest.raises(Diverged, match="steps 199 to 202"):
        again.after_step(202, torch.zeros(()))


def test_guard_warns_of_more_than_one_in_twenty():
    guard = Guard(batch=8)
    said = []
    for step in range(1, 301):
        guard.after_step(step, torch.tensor(step not in (40, 80, 120, 160, *range(200, 205))))
        if step % 20 == 0:
            said.append((step, guard.warning(step)))
    texts = {step: text for step, text in said if text}
    assert list(texts) == [220]  # 160 and 200 to 204
    assert texts[220].startswith("6 of the last 100 steps")
    assert "step 204 (positions 1624 to 1631)" in texts[220]
    assert guard.finish(301) is None  # 9 of 301
    assert "20 of 301 steps" in Guard(skipped=20, batch=8).finish(301)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stop_is_agreed_one_call_later(tmp_path, number):
    before = signal.getsignal(number)
    with StopRequest([tmp_path], ALONE) as stop:
        assert [stop.agreed(), stop.agreed()] == [False, False]
        os.kill(os.getpid(), number)
        assert [stop.agreed(), stop.agreed()] == [False, True]
        assert stop.preempted == (number == signal.SIGUSR1)
    assert signal.getsignal(number) is before


def test_stop_file_is_seen_and_cleared(tmp_path):
    with StopRequest([tmp_path], ALONE) as stop:
        (tmp_path / "STOP").touch()
        assert [stop.agreed(), stop.agreed()] == [False, True]
    assert not (tmp_path / "STOP").exists()


def test_a_second_interrupt_leaves_at_once(tmp_path, capfd):
    with StopRequest([tmp_path], ALONE):
        os.kill(os.getpid(), signal.SIGINT)
        assert "Ctrl-C again leaves at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_interrupt_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for jobs in the background
    try:
        with StopRequest([tmp_path], ALONE):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stop_beats_missing_data(tmp_path):
    stop = StopRequest([tmp_path], ALONE)
    assert [stop.agreed(failed=True), stop.agreed(), stop.failed] == [False, True, True]
    (tmp_path / "STOP").touch()
    stop = StopRequest([tmp_path], ALONE)
    assert [stop.agreed(failed=True), stop.agreed(), stop.failed] == [False, True, False]


def test_metrics_after_the_resumed_step_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    truncate_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    truncate_lines(path, 0)
    assert path.read_text() == ""


def test_metrics_that_are_no_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: is not a regular file"):
        truncate_lines(tmp_path / "metrics.jsonl", 2)


def test_rows_a_full_disk_refuses_are_kept(tmp_path, caplog):
    lines = AppendedLines(tmp_path / "metrics.jsonl")
    lines.add("one")
    real = lines._file

    class Full:
        def write(self, data):
            real.write(data[:2])  # what a full disk does: a part, then nothing
            return 2

        def truncate(self, size):
            return real.truncate(size)

    lines._file = Full()
    lines.add("two")
    assert "no space left" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_text() == "one\n"
    lines._file = real
    lines.add("three")
    assert (tmp_path / "metrics.jsonl").read_text() == "one\ntwo\nthree\n"


def test_clock_does_not_count_time_away(monkeypatch):
    now = iter([100.0, 101.0, 104.0, 105.0, 107.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    with clock.away():
        pass
    assert clock.rate(10) == 10 / 2
    assert clock.rate(10) == 10 / 2


def test_ceiling_of_bf16_on_a_cpu_tries_fp32_too(monkeypatch):
    seen, random = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, dtype, **rest: seen.append(dtype) or random(4, 4, dtype=dtype))
    matmul_ceiling(torch.device("cpu"), "bf16")
    assert set(seen) == {torch.bfloat16, torch.float32}


def test_ceiling_is_a_rate():
    assert 1e8 < matmul_ceiling(torch.device("cpu"), "fp32") < 1e15


def test_errors_of_rank_zero_become_user_errors():
    with pytest.raises(UserError, match="No such file"):
        ALONE.agree(lambda: Path("/nowhere/at/all").read_text())
    with pytest.raises(UserError, match="left on device: '/dev/full'; mend it"):  # a failed write too is named
        ALONE.agree(lambda: files.write_synced(Path("/dev/full"), b"x"))
    assert ALONE.agree(lambda: [1, "a"]) == [1, "a"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_tensor_files_are_safetensors(tmp_path, dtype):
    from safetensors.torch import load_file

    given = {"odd.name": torch.arange(15).reshape(3, 5).to(dtype), "scalar": torch.tensor(3).to(dtype)}
    given["strided"] = given["odd.name"].t()
    file = TensorFile(tmp_path / "x.safetensors", [(name, t.dtype, t.shape) for name, t in given.items()])
    for tensor in given.values():
        file.add(tensor)
    content = (tmp_path / "x.safetensors").read_bytes
    assert file.finish() == {"bytes": len(content()), "sha256": hashlib.sha256(content()).hexdigest()}
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) for name in given)
