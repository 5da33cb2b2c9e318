"""The trainer's command line, RECIPE key=value ..., for `dit-fast train`, `deepspeed --module` and torchrun."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from dit_fast import terminal
from dit_fast.errors import Status
from dit_fast.train import leash

if TYPE_CHECKING:
    from dit_fast.runs import TrainConfig

logger = logging.getLogger("dit_fast")

FOR_TORCH = {  # read when it is imported, unless the user has set them
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # else a stack trace for each connection that breaks; the error is caught and named
    "TORCH_FR_BUFFER_SIZE": "200",  # of the flight recorder: which collective is under way
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one process of a training run and returns its exit status (`errors.Status`).

    torch is imported only when the launcher is watched and errors are caught.
    """
    leash.arm()
    for name, value in FOR_TORCH.items():
        os.environ.setdefault(name, value)
    rank = os.environ.get("RANK", "0")
    return terminal.run(
        _work,
        argv,
        rank=int(rank) if rank.isdecimal() and len(rank) < 10 else 0,
        interrupted="interrupted; the same command goes on from the newest checkpoint",
    )


def _work(arguments: list[str]) -> Status:
    from dit_fast.options import to_dict
    from dit_fast.recipes import load
    from dit_fast.world import launch_place

    options = _parser().parse_intermixed_args(arguments)
    place = launch_place()
    rank = place.rank if place else 0
    logging.basicConfig(format="dit-fast: %(message)s", stream=sys.stderr)
    logging.getLogger("dit_fast").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    config = load(options.recipe, options.overrides)
    if options.plan is not None:
        from dit_fast.train.memory import report

        print(report(config, options.plan, options.ranks))
    elif not options.print_config:
        return _train(config)
    elif rank == 0:
        print(json.dumps(to_dict(config), indent=1))
    return Status.DONE


def _train(config: "TrainConfig") -> Status:
    import torch

    from dit_fast.cpu import bf16_warning, use_threads
    from dit_fast.train.allocator import keep_memory
    from dit_fast.train.loop import train
    from dit_fast.train.peers import explain
    from dit_fast.train.stop import Preempted
    from dit_fast.world import launched, single

    if config.engine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch demands it before the first product
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if launched():
        from dit_fast.train.group import start_world

        world = start_world(config.engine.timeout)
    else:
        world = single()
    if world.device.type == "cpu":
        keep_memory()
        logger.info(use_threads(world))
        if config.engine.precision == "bf16" and world.rank == 0 and (slow := bf16_warning()):
            logger.warning(slow)
    status = Status.DONE
    try:
        try:
            train(config, world)
        except Preempted:
            status = Status.RESTART
        world.close()
        return status
    except Exception as error:
        lost = explain(error, world)
        if lost is None:
            raise
        raise lost from error


EXAMPLE = "dit-fast train diversedit-b2-256 data.path=shards run.dir=runs/b2 engine.global_batch=128"


def _parser() -> argparse.ArgumentParser:
    from dit_fast.recipes import RECIPES

    parser = terminal.Parser(
        prog="dit-fast train",
        description="Train a diffusion transformer. The same command, started again, resumes the run.",
        epilog="\n  ".join(["example:", EXAMPLE, "\nrecipes:", *_short(RECIPES)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe, or a .json configuration")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes, e.g. optimizer.lr=2e-4")
    parser.add_argument("--print-config", action="store_true", help="print the configuration and leave")
    parser.add_argument(
        "--plan", type=float, metavar="GIB", help="memory of a step; its largest micro-batch in that much"
    )
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="with --plan: processes, one device each")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


def _short(names: Iterable[str]) -> list[str]:
    """Those that differ in their last word, and in the one before a number, on one line: sit-{b2,l2}-{256,512}."""
    words: dict[str, list[str]] = {}
    for head, last in (name.rpartition("-")[::2] for name in names):
        words.setdefault(head, []).append(last)
    lines: dict[tuple[str, str], list[str]] = {}
    for head, ends in words.items():
        start, middle = head.rpartition("-")[::2] if ends[0].isdigit() else ("", head)
        lines.setdefault((start, _braced(ends)), []).append(middle)
    return ["-".join(filter(None, (start, _braced(middle), end))) for (start, end), middle in lines.items()]


def _braced(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{{{','.join(words)}}}"


if __name__ == "__main__":
    status = main()
    if status == Status.RESTART:
        os._exit(status)  # leaving the process group would wait for the dead
    sys.exit(status)
