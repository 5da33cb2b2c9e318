"""Every command explains itself, with an example."""

import os
import subprocess
import sys

import pytest

from dit_fast.cli import main

COMMANDS = [
    "train", "sample", "evaluate", "analyse", "compare", "sweep", "report", "export", "import", "shards",
    "info", "bench", "watch",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    words = capsys.readouterr().out.split()
    examples = words[[word.lower().rstrip("s:") for word in words].index("example") :]
    assert any(examples[i : i + 2] == ["dit-fast", command] for i in range(len(examples)))


def test_help_lists_them_all(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert set(COMMANDS) <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("chosen", "command", "policy"), [("", "info", "PASSIVE"), ("ACTIVE", "info", "ACTIVE"), ("", "bench", None)]
)
def test_idle_threads_sleep_unless_told_otherwise(chosen, command, policy):
    code = (
        "import os, sys\nfrom dit_fast import cli\ncli.terminal.run = lambda *_: 0\n"
        f"cli.main([{command!r}])\nassert 'torch' not in sys.modules  # it would have read the variable\n"
        "print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": chosen} if chosen else {}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(policy), done.stderr


def test_a_trainer_sets_what_torch_reads_when_imported():
    code = (
        "import os, sys\nfrom dit_fast.train import __main__ as trainer\ntrainer.terminal.run = lambda *_, **__: 0\n"
        "trainer.main([])\nassert 'torch' not in sys.modules\n"
        "print({name: os.environ[name] for name in trainer.FOR_TORCH} == trainer.FOR_TORCH)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "True", done.stderr


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "dit_fast", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("dit_fast "), done.stderr
