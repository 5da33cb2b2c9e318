"""The trainer's command line, RECIPE key=value ..., for `dit-fast train`, `deepspeed --module` and torchrun."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence

from dit_fast.errors import UserError
from dit_fast.options import to_dict
from dit_fast.recipes import RECIPES, load


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one process of a training run. Errors a user can fix are printed as one line; the exit status is then 2."""
    options = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    rank = int(os.environ.get("RANK", 0))
    logging.basicConfig(format="dit-fast: %(message)s", stream=sys.stderr)
    logging.getLogger("dit_fast").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    try:
        config = load(options.recipe, options.overrides)
        if options.print_config:
            if rank == 0:
                print(json.dumps(to_dict(config), indent=1))
            return 0
        _train(config)
    except UserError as error:
        from dit_fast.train.loop import RankError

        if rank == 0 or isinstance(error, RankError):
            print(f"dit-fast: error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        if rank == 0:
            print("dit-fast: interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


def _train(config: object) -> None:
    from dit_fast.train.loop import train
    from dit_fast.train.world import launched, single

    if launched():
        from dit_fast.train.zero import start_world

        world = start_world()
    else:
        world = single()
    train(config, world)  # type: ignore[arg-type]
    world.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dit-fast train",
        description="Train a diffusion transformer. The same command, started again, resumes the run.",
        epilog=f"recipes: {', '.join(RECIPES)}",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe, or a .json configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes, e.g. optimizer.lr=2e-4")
    parser.add_argument("--print-config", action="store_true", help="print the configuration and leave")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


if __name__ == "__main__":
    sys.exit(main())
