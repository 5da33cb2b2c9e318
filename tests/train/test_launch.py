"""The launch examples, dry: each script runs with stand-ins for the launchers, and the command it makes is parsed."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from dit_fast.errors import Status
from dit_fast.recipes import load
from dit_fast.train.__main__ import _parser

LAUNCH = Path(__file__).parents[2] / "train/launch"
RUN = ["diversedit-xl2-256", "data.path=/data/shards", "run.dir=/data/a run"]
# Says how it was started and with what; `python` ends as it is told to.
STAND_IN = """#!/bin/bash
keep=$(env | grep -E '^(RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT|OMP_NUM_THREADS)=' | tr '\\n' ' ')
{ printf '%s\\0' "$(basename "$0")" "$keep" "$@"; printf '\\1'; } >> "$SAID"
case $(basename "$0") in
    srun)
        shift 2
        for SLURM_PROCID in 0 15; do
            export SLURM_PROCID SLURM_LOCALID=$((SLURM_PROCID % 8))
            "$@" || exit $?
        done ;;
    scontrol) [ "$1" != show ] || printf 'node1\\nnode2\\n' ;;
    python) exit "$STATUS" ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    """Runs a command where launchers are stand-ins; what each of them was told."""

    def started(*command, check=True, **variables):
        for name in ("torchrun", "deepspeed", "srun", "scontrol", "python"):
            (tmp_path / name).write_text(STAND_IN)
            (tmp_path / name).chmod(0o755)
        said = tmp_path / "said"
        said.unlink(missing_ok=True)
        place = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SAID": str(said), "STATUS": "0"}
        done = subprocess.run(command, env=place | variables, capture_output=True, text=True, cwd=LAUNCH.parents[1])
        assert done.returncode == 0 or not check, done.stderr
        told = said.read_text().split("\1")[:-1] if said.exists() else []
        return done.returncode, [words.split("\0")[:-1] for words in told]

    return started


def trains(words):
    """Whether the trainer's own parser and the recipe take these words."""
    options = _parser().parse_intermixed_args(words)
    return load(options.recipe, options.overrides)


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize(("script", "ends"), [("torchrun.sh", ["-m"]), ("deepspeed.sh", ["--module"])])
def test_a_launcher_gets_the_machine_and_the_run(run, script, ends):
    _, (told,) = run(LAUNCH / script, *RUN, NODE_RANK="1", MASTER_ADDR="node1")
    at = told.index("dit_fast.train")
    options = dict(zip(told[2:at:2], told[3:at:2], strict=False))
    assert told[0] == script.removesuffix(".sh")
    assert told[at - 1 : at] == ends
    assert trains(told[at + 1 :]).run.dir == "/data/a run"
    if script == "torchrun.sh":
        assert (options["--nnodes"], options["--nproc-per-node"], options["--max-restarts"]) == ("2", "8", "3")
    joined = " ".join(told).replace("-", "_")
    assert "node_rank 1 __master_addr node1 __master_port 29500" in joined


def test_the_machine_must_be_told(run):
    for script in ("torchrun.sh", "deepspeed.sh"):
        code, said = run(LAUNCH / script, *RUN, check=False, MASTER_ADDR="node1")
        assert (code, said) == (1, []) or (code, said) == (127, [])


SLURM = {
    "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "7"
}  # fmt: skip


def test_slurm_starts_a_rank_for_each_gpu(run):
    _, said = run(LAUNCH / "slurm.sh", *RUN, **SLURM)
    ranks = [told for told in said if told[0] == "python"]
    place = dict(word.split("=", 1) for word in ranks[-1][1].split())
    assert place == {
        "RANK": "15", "LOCAL_RANK": "7", "WORLD_SIZE": "16", "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
        "OMP_NUM_THREADS": "8",
    }  # fmt: skip
    assert ranks[-1][2:4] == ["-m", "dit_fast.train"]
    assert trains(ranks[-1][4:]).data.path == "/data/shards"


@pytest.mark.parametrize("status", [*Status, 137])
def test_slurm_requeues_what_a_restart_mends(run, status):
    code, said = run(LAUNCH / "slurm.sh", *RUN, check=False, STATUS=str(int(status)), **SLURM)
    assert code == status
    mends = status not in (Status.DONE, Status.USER, Status.DIVERGED, Status.INTERRUPTED)
    assert (["scontrol", "requeue", "7"] in [[told[0], *told[2:]] for told in said]) is mends


def test_the_jobset_starts_deepspeed_on_each_machine(run, tmp_path):
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    (ranks,) = job["spec"]["replicatedJobs"]
    work = ranks["template"]["spec"]
    (container,) = work["template"]["spec"]["containers"]
    place = {each["name"]: each["value"] for each in container["env"]}
    script = container["args"][0].replace("/tmp/hostfile", f"{tmp_path}/hosts")
    _, (told,) = run(*container["command"], script, JOB_COMPLETION_INDEX="1", **place)
    at = told.index("dit_fast.train")
    assert trains(told[at + 1 :]).model.name == "SiT-XL/2"
    hosts = (tmp_path / "hosts").read_text().splitlines()
    name = f"{job['metadata']['name']}-{ranks['name']}-0"
    assert hosts == [f"{name}-{i}.{job['metadata']['name']} slots=8" for i in range(work["completions"])]
    assert told[told.index("--master_addr") + 1] == hosts[0].split()[0]
    assert told[told.index("--node_rank") + 1] == "1"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    (rule,) = work["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [Status.USER, Status.DIVERGED, Status.INTERRUPTED]
    assert json.loads(json.dumps(job))  # no dates or other YAML types


def test_the_hostfile_is_deepspeeds():
    lines = [line for line in (LAUNCH / "hostfile").read_text().splitlines() if line and not line.startswith("#")]
    assert [line.split() for line in lines] == [["node1", "slots=8"], ["node2", "slots=8"]]
