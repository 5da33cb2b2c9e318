"""`dit-fast sweep RECIPE ... | FILE.toml`."""

import argparse
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

EXAMPLE = """example:
  dit-fast sweep quickstart-sit quickstart run.steps=500 --seeds 0,1,2 --out runs/pair
  dit-fast sweep study.toml data.path=runs/study/shards --out runs/study

Each run is `dit-fast train` in OUT/NAME/seedS. Started again, the command skips what is done, resumes what is not, and
tries again what failed."""


def add_commands(subparsers: Any) -> None:
    """Adds the command; it sets `run`, a function of the parsed options."""
    sweeping = subparsers.add_parser(
        "sweep",
        help="train recipes times seeds, each in a folder of its own",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweeping.set_defaults(run=_sweep)
    sweeping.add_argument(
        "words", nargs="+", metavar="RECIPE|FILE.toml|key=value", help="what to run, and changes of it"
    )
    sweeping.add_argument("--out", type=Path, required=True, help="folder of the sweep")
    sweeping.add_argument(
        "--seeds", help="e.g. 0,1,2 (default: the file's, or 0): run.seed, data.seed and run.noise_seed"
    )
    sweeping.add_argument("--only", default="", metavar="NAME,...", help="these runs of the file alone")
    sweeping.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    sweeping.add_argument("--processes", type=int, default=1, metavar="N", help="of each run, by DeepSpeed's launcher")
    sweeping.add_argument("--dry-run", action="store_true", help="print the commands and leave")


def _sweep(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from dit_fast.errors import ConfigError
    from dit_fast.sampling.output import check_writable, writing
    from dit_fast.sweep.jobs import Record, find_slots, read_record, run_all, shown, steps_done
    from dit_fast.sweep.plan import from_words, members
    from dit_fast.train.lock import RunLock

    for name in ("jobs", "processes"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)}: must be at least 1")
    sweep = from_words(options.words)
    if options.seeds is not None:
        sweep = replace(sweep, seeds=_seeds(options.seeds))
    only = [name for name in options.only.split(",") if name]
    runs = members(sweep, options.out, options.processes, only)
    slots = find_slots(options.jobs, options.processes)
    if options.dry_run:
        for member in runs:
            print(f"# {member.label}: done" if member.done() else shown(slots, member))
        return 0
    check_writable(options.out)
    lock = RunLock(options.out)
    try:
        with writing(options.out):
            record = Record(options.out, runs)
            total, begun = sum(member.steps for member in runs), sum(map(steps_done, runs))
            with tqdm(
                total=total, initial=begun, unit="step", desc=str(options.out), disable=None, smoothing=0.05
            ) as bar:

                def progress(line: str, steps: int) -> None:
                    bar.update(steps - bar.n if not bar.disable else 0)
                    if line:
                        bar.write(line, file=sys.stderr)

                run_all(runs, slots, record, progress)
    finally:
        lock.release()
    wanted = {member.label for member in runs}
    states = Counter(each["state"] for each in read_record(options.out) if each["folder"] in wanted)
    print(f"{options.out}: " + ", ".join(f"{count} {state}" for state, count in sorted(states.items())))
    return 0 if states["done"] == len(runs) else 1


def _seeds(text: str) -> tuple[int, ...]:
    from dit_fast.errors import ConfigError

    try:
        return tuple(int(item) for item in text.split(","))
    except ValueError:
        raise ConfigError(f"--seeds {text}: expected whole numbers with commas between, e.g. 0,1,2") from None
