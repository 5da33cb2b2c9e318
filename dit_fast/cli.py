"""`dit-fast`: the command line. Each command is built and run by the room that owns it."""

import argparse
import os
import sys
from collections.abc import Sequence

from dit_fast import __version__, terminal
from dit_fast.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status. Errors are one line (`dit_fast.terminal`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = [argument for argument in arguments if argument != "--traceback"][:1]
    if first != ["bench"]:
        # Read when torch is loaded. Where others use the same cores, threads that spin while they wait make all slow.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if first == ["train"]:
        from dit_fast.train.__main__ import main as train  # shared with `deepspeed --module`

        arguments.remove("train")
        return train(arguments)
    if first == ["bench"]:
        from dit_fast.benchmarks.__main__ import main as bench  # shared with `python -m dit_fast.benchmarks`

        arguments.remove("bench")
        return terminal.run(bench, arguments)
    return terminal.run(_work, arguments)


def _work(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    from dit_fast.analysis import command as analysis
    from dit_fast.evaluation import command as evaluation
    from dit_fast.exchange import command as exchange
    from dit_fast.preparation import command as shards
    from dit_fast.report import command as report
    from dit_fast.sampling import command as sampling
    from dit_fast.sweep import command as sweep

    parser = terminal.Parser(prog="dit-fast", description="Train diffusion transformers, fast and exactly.")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised (any command)")
    parser.add_argument("--version", action="version", version=f"dit_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser(
        "info",
        help="versions, devices, optional packages, which backend each op uses; the plan of a run on many GPUs",
        epilog="examples: dit-fast info; dit-fast info --plan diversedit-xl2-256 --gpus 8,64 --gpu h800",
    )
    info.add_argument("--plan", metavar="RECIPE", help="plan (never measured): times, GPU-hours, memory of a run")
    info.add_argument("overrides", nargs="*", metavar="key=value", help="with --plan: changes of the recipe")
    info.add_argument("--gpus", type=_numbers, default=[8], metavar="N[,N...]", help="numbers of GPUs (8)")
    info.add_argument("--gpu", default="h800", choices=("h800", "h100", "h200", "a100"), help="which (h800)")
    info.add_argument("--nodes-of", type=int, default=8, metavar="N", help="GPUs of one machine (8)")
    info.add_argument(
        "--per-gpu", type=int, default=0, metavar="N", help="samples of each GPU; the batch grows with the GPUs"
    )
    info.set_defaults(run=_info)
    commands.add_parser("train", help="train in one process: dit-fast train RECIPE key=value ...", add_help=False)
    commands.add_parser("bench", help="measure ops and the whole training step: dit-fast bench NAME", add_help=False)
    sweep.add_commands(commands)
    shards.add_commands(commands)
    sampling.add_commands(commands)
    evaluation.add_commands(commands)
    analysis.add_commands(commands)
    report.add_commands(commands)
    exchange.add_commands(commands)
    return parser


def _info(options: argparse.Namespace) -> int:
    if options.plan is not None:
        from dit_fast.recipes import load
        from dit_fast.train.scaling import report

        config = load(options.plan, options.overrides)
        print(report(config, options.gpus, options.gpu, options.nodes_of, options.per_gpu))
        return 0
    if options.overrides:
        raise ConfigError("dit-fast info: key=value changes the recipe of --plan RECIPE; give one")
    from dit_fast.info import describe

    print(describe())
    return 0


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of numbers such as 8,64") from None


if __name__ == "__main__":
    sys.exit(main())
