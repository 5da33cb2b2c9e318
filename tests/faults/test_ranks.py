"""Two ranks through the real launchers and through kills. Starting processes costs seconds: each start proves much."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dit_fast.checkpoint.run import load_run
from dit_fast.train.__main__ import main
from tests.helpers.no_gpu import no_gpu  # noqa: F401
from tests.helpers.toy_runs import (
    ROOT,
    Ranks,
    arguments,
    environment,
    free_port,
    losses,
    make_shards,
    rows,
    rows_so_far,
    tensors,
    wait_for,
)

pytestmark = pytest.mark.launch

SCRIPTS = Path(sys.executable).parent


def finish(command, log):
    """Runs two ranks to their end; an abort of a rank in its teardown is forgiven, lost work is not."""
    with Ranks(command, log) as ranks:
        codes = ranks.wait()
        assert codes == [0, 0], ranks.text()[-3000:]


KILLS = [
    (2, "bf16"),  # states of every kind, in parts; `make chaos` kills single processes
    *(
        pytest.param(stage, precision, marks=pytest.mark.long)
        for stage in (1, 2, 0, 3)
        for precision in ("fp32", "bf16")
        if (stage, precision) != (2, "bf16")
    ),
]


@pytest.mark.parametrize(("stage", "precision"), KILLS)
def test_killed_and_restarted_equals_never_killed(shards, tmp_path, stage, precision):
    """SIGKILL to both ranks at a random moment; the same command again. Rows, weights, EMA and moments: equal bits."""
    options = [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    finish(arguments(shards, calm, *options), tmp_path / "calm.log")
    moment = random.Random()
    seed = moment.randrange(1 << 30)
    moment.seed(seed)
    after = moment.randint(1, 11)
    with Ranks(arguments(shards, killed, *options), tmp_path / "killed.log") as ranks:
        wait_for(lambda: len(rows_so_far(killed)) >= after or ranks.processes[0].poll() is not None)
        time.sleep(moment.uniform(0, 0.2))
        ranks.kill()
    finish(arguments(shards, killed, *options), tmp_path / "killed.log")
    assert rows(killed) == rows(calm), f"seed {seed}"
    first, second = tensors(killed, 12), tensors(calm, 12)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first), f"seed {seed}"
    assert "optim-00002-of-00002.safetensors" in os.listdir(killed / "checkpoints/step_00000012")


def test_torchrun_equals_one_process_and_hands_over_to_it(shards, tmp_path):
    """ZeRO-1 on two ranks, then the same run continued by one plain process from its step 8: the same losses."""
    plain = ["methods=none", "engine.zero_stage=1", "preview.every=12", "preview.count=4", "preview.num_steps=2"]
    assert main(arguments(shards, tmp_path / "one", *plain)) == 0
    command = [
        SCRIPTS / "torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), "-m", "dit_fast.train",
        *arguments(shards, tmp_path / "two", *plain),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, cwd="/")
    assert (tmp_path / "two/checkpoints/step_00000012").is_dir(), done.stdout + done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    assert (tmp_path / "two/samples/step_00000012.png").is_file()
    path = tmp_path / "two/checkpoints/step_00000012"
    path.rename(path.with_suffix(".away"))
    assert main(arguments(shards, tmp_path / "two", *plain)) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    one, two = tensors(tmp_path / "one", 12), tensors(tmp_path / "two", 12)
    assert one.keys() == two.keys()
    for kind in ("model", "ema"):
        a, b = (torch.cat([s[key].flatten() for key in sorted(s) if key.startswith(kind)]) for s in (one, two))
        assert ((a - b).norm() / a.norm()).item() < 1e-5


def deepspeed(*arguments, **options):
    command = [SCRIPTS / "deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), *arguments]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/", **options
    )


def test_deepspeed_launcher_sigterm_and_script_form(shards, tmp_path):
    """SIGTERM to rank 0: all ranks save where they are and the job ends with 0; the script form finishes the run."""
    run = tmp_path / "run"
    command = arguments(shards, run, "run.steps=5000", "run.checkpoint_every=0", "engine.zero_stage=2")
    job = deepspeed("--module", "dit_fast.train", *command)
    try:
        wait_for(lambda: len(rows_so_far(run)) >= 3 or job.poll() is not None)
        os.kill(json.loads((run / "lock.json").read_text())["pid"], signal.SIGTERM)
        text = job.communicate(timeout=120)[0]
    finally:
        job.kill()
    assert job.returncode == 0, text
    stopped = load_run(run).step
    assert 3 <= stopped < 5000
    assert f"stopped at step {stopped} as asked" in text
    assert rows(run)[-1]["step"] == stopped
    job = deepspeed(str(ROOT / "train/__main__.py"), *command, f"run.steps={stopped + 2}")
    text = job.communicate(timeout=240)[0]
    assert load_run(run).step == stopped + 2, text
    assert f"from step {stopped} to {stopped + 2}" in text
    assert "WARNING" not in text.split("from step")[1]


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.long)])
def test_damaged_data_on_one_rank_loses_no_step(tmp_path, stage):
    """One sample, so one rank has no batch for some step: all save at the step before it, and one line says why."""
    broken, run = make_shards(tmp_path), tmp_path / "run"
    tar = sorted(broken.glob("*.tar"))[1]
    data = bytearray(tar.read_bytes())
    data[1024 + 200] ^= 255
    tar.write_bytes(data)
    options = ["run.checkpoint_every=0", "data.strict=true", f"engine.zero_stage={stage}"]
    with Ranks(arguments(broken, run, *options), tmp_path / "log") as job:
        assert job.wait() == [2, 2], job.text()[-3000:]
        lines = [line for line in job.text().splitlines() if " error: " in line]
        assert len(lines) == 1, job.text()
    assert re.search(rf"error: rank [01]: .*{tar.name}", lines[0])
    assert [row["step"] for row in rows(run)] == list(range(1, load_run(run).step + 1))


def test_an_error_is_one_line_on_one_rank(shards, tmp_path):
    with Ranks(arguments(shards, tmp_path / "run", "engine.global_batch=7"), tmp_path / "log") as ranks:
        assert ranks.wait() == [2, 2]
        lines = [line for line in ranks.text().splitlines() if "error" in line]
    assert lines == [
        "dit-fast: error: engine.global_batch=7 does not divide over 2 ranks; use a multiple of 2 (6) or 1 processes"
    ]


def test_a_port_in_use_is_named(shards, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "dit_fast.train", *arguments(shards, tmp_path / "run")]
        done = subprocess.run(command, env=environment(**place), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"rank 0 cannot meet the others at 127.0.0.1:{port}" in done.stderr.splitlines()[-1]


@pytest.mark.long
def test_two_nodes_without_ssh(shards, tmp_path):
    """Two "machines" on this one, as a scheduler would start them; equal to one process."""
    hosts = tmp_path / "hosts"
    hosts.write_text("node0 slots=1\nnode1 slots=1\n")
    port, options = str(free_port()), ["methods=none", "engine.zero_stage=1"]
    jobs = [
        subprocess.Popen(
            [
                SCRIPTS / "deepspeed", "--hostfile", hosts, "--no_ssh", "--node_rank", str(node), "--master_addr",
                "127.0.0.1", "--master_port", port, "--module", "dit_fast.train",
                *arguments(shards, tmp_path / "run", *options),
            ],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/",
        )
        for node in range(2)
    ]  # fmt: skip
    texts = [job.communicate(timeout=300)[0] for job in jobs]
    assert main(arguments(shards, tmp_path / "one", *options)) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-6), texts
