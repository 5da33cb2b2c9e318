"""Every command explains itself, with an example."""

import pytest

from dit_fast.cli import main

COMMANDS = [
    "train", "sample", "evaluate", "analyse", "compare", "sweep", "report", "export", "import", "shards",
    "info", "bench",
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
