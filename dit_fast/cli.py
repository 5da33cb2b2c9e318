"""`dit-fast`: the command line. Each command is built and run by the room that owns it."""

import argparse
import os
import sys
from collections.abc import Sequence

from dit_fast import __version__
from dit_fast.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Errors a user can fix are printed as one line; the exit status is then 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:  # the trainer has its own command line, shared with `deepspeed --module`
        from dit_fast.train.__main__ import main as train

        return train(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except UserError as error:
        print(f"dit-fast: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader left (`dit-fast info | head`); nothing more can be written, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    from dit_fast.data import command as shards
    from dit_fast.report import command as report

    parser = argparse.ArgumentParser(prog="dit-fast", description="Train diffusion transformers, fast and exactly.")
    parser.add_argument("--version", action="version", version=f"dit_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="versions, devices, optional packages, and which backend each op uses")
    info.set_defaults(run=_info)
    commands.add_parser("train", help="train in one process: dit-fast train RECIPE key=value ...", add_help=False)
    shards.add_commands(commands)
    report.add_commands(commands)
    return parser


def _info(options: argparse.Namespace) -> int:
    from dit_fast.info import describe

    print(describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
