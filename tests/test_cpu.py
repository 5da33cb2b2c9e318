"""Cores, quotas, ranks beside each other and bf16, on machines made up of files."""

import os
import subprocess
import sys

import pytest
import torch

from dit_fast import cpu, world
from dit_fast.world import World
from tests.helpers.toy_runs import free_port

ALONE = World(0, 1, torch.device("cpu"))


def test_hyperthreads_of_a_core_count_once(tmp_path):
    for number in range(8):  # 0 and 4 are one core, 1 and 5 another, ...
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    assert cpu.physical(set(range(8)), tmp_path) == 4
    assert cpu.physical({0, 4, 1}, tmp_path) == 2
    assert cpu.physical({0, 1, 20}, tmp_path) == 3  # a machine that does not say counts each


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        ("0::/a", {"a/cpu.max": "400000 100000", "cpu.max": "200000 100000"}, 2.0),
        ("0::/", {}, None),
        ("3:cpu,cpuacct:/x", {"cpu/x/cpu.cfs_quota_us": "50000", "cpu/x/cpu.cfs_period_us": "100000"}, 0.5),
        ("3:cpu,cpuacct:/x", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, None),
        ("4:memory:/x", {"cpu/x/cpu.cfs_quota_us": "50000", "cpu/x/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_the_quota_of_all_groups_around(tmp_path, own, files, expected):
    (tmp_path / "own").write_text(own + "\n")
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert cpu.quota(tmp_path / "root", tmp_path / "own") == expected


@pytest.mark.parametrize(
    ("limit", "ranks", "expected"), [(None, 1, 8), (None, 3, 2), (2.9, 1, 2), (0.5, 1, 1), (4, 9, 1)]
)
def test_threads_are_a_share_of_cores_within_the_quota(monkeypatch, limit, ranks, expected):
    monkeypatch.setattr(cpu, "physical", lambda logical: 8)
    monkeypatch.setattr(cpu, "quota", lambda: limit)
    assert cpu.threads(set(range(16)), ranks) == expected


def test_what_the_environment_says_stays(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", str(before))
    monkeypatch.setattr(cpu, "threads", lambda *given: before + 1)
    assert cpu.use_threads(ALONE).endswith("(OMP_NUM_THREADS says so)")
    assert torch.get_num_threads() == before


RANK = """
import os, torch
from dit_fast import cpu, world
from dit_fast.world import World
from tests.helpers.toy_runs import free_port
rank = int(os.environ["RANK"])
cpu.physical, cpu.quota = len, lambda: None
torch.distributed.init_process_group("gloo")
for cores in ({0, 1}, {rank}):  # a launcher may have bound each rank to cores of its own
    torch.set_num_threads(2)
    cpu.usable = lambda: cores
    print(cpu.use_threads(World(rank, 2, torch.device("cpu"))), torch.get_num_threads())
torch.distributed.destroy_process_group()
"""


def test_two_ranks_on_two_cores_take_one_thread_each():
    environment = {name: value for name, value in os.environ.items() if name not in cpu.CHOSEN_BY_USER}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK], env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for shared, apart in [process.communicate(timeout=60)[0].splitlines() for process in started]:
        assert all(line.startswith("1 CPU thread (") and line.endswith(" 1") for line in (shared, apart))
        assert ("shared by 2 ranks" in shared, "shared by 2 ranks" in apart) == (True, False)


def test_bf16_instructions_are_those_that_the_kernel_lists(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16\n")
    assert cpu.bf16_instructions(path) == "amx_bf16"
    path.write_text("flags\t\t: fpu avx2\n")
    assert cpu.bf16_instructions(path) is None
    assert cpu.bf16_instructions(tmp_path / "none") is None


def test_slow_bf16_is_warned_about_with_both_rates():
    rates = {torch.bfloat16: 5e9, torch.float32: 9e10}
    message = cpu.bf16_warning(lambda: None, rates.__getitem__)
    assert "5 GFLOP/s" in message
    assert "fp32 at 90, 18.0 times as fast" in message
    assert cpu.bf16_warning(lambda: None, {torch.bfloat16: 2.0, torch.float32: 1.0}.__getitem__) is None
    assert cpu.bf16_warning(lambda: "amx_bf16", None) is None  # nothing is measured
    assert cpu.matmul_rate(torch.float32) > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_says_so(monkeypatch, tmp_path, precision):
    from dit_fast.train import __main__ as trainer
    from dit_fast.train import loop

    said = []
    monkeypatch.setattr(cpu, "bf16_warning", lambda: "bf16 is slow here")
    monkeypatch.setattr(world, "single", lambda: ALONE)
    monkeypatch.setattr(loop, "train", lambda config, alone: None)
    monkeypatch.setattr(trainer.logger, "warning", said.append)
    trainer._train(trainer_config(precision))
    assert said == (["bf16 is slow here"] if precision == "bf16" else [])


def trainer_config(precision):
    from dit_fast.runs import TrainConfig, changed

    return changed(TrainConfig(), [f"engine.precision={precision}"])


def test_info_says_what_training_takes():
    from dit_fast.info import describe

    (line,) = (line for line in describe().splitlines() if line.startswith("cpu "))
    assert "training takes" in line
    assert "bf16" in line
