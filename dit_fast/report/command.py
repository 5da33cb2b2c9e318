"""`dit-fast report RUN`, `dit-fast watch RUN` and `dit-fast compare RUN ...`."""

import argparse
from pathlib import Path
from typing import Any


def add_commands(subparsers: Any) -> None:
    """Adds the commands; each sets `run`, a function of the parsed options."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    reporting = subparsers.add_parser(
        "report",
        help="write report.html about a run, or several side by side",
        description="One page that stands alone: samples, curves, what was measured, how alike the blocks are. "
        "Example: dit-fast report runs/diversedit runs/sit runs/repa --out runs/report",
        formatter_class=formatter,
    )
    reporting.set_defaults(run=_report)
    reporting.add_argument("folders", metavar="RUN", type=Path, nargs="+", help="run folders; the first is shown whole")
    reporting.add_argument("--baseline", type=Path, help="one more run beside the first")
    reporting.add_argument("--data", help="where the data set of the runs lies now, if it moved")
    reporting.add_argument("--out", type=Path, help="folder for report.html and its pictures (default: RUN/report)")
    reporting.add_argument("--note", action="append", default=[], help="a remark to show at the top; may be repeated")
    watching = subparsers.add_parser(
        "watch",
        help="how a run stands: loss, speed, slowest rank, time left, checkpoint",
        description="A table that renews itself until the run has ended; it reads only files of the run folder. "
        "Example: dit-fast watch runs/b2",
        formatter_class=formatter,
    )
    watching.set_defaults(run=_watch)
    watching.add_argument("folder", metavar="RUN", type=Path, help="run folder; the run may go on, have ended or died")
    watching.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between two looks")
    watching.add_argument("--once", action="store_true", help="print it once, for scripts")
    comparing = subparsers.add_parser(
        "compare",
        help="compare what was measured of runs, over training seeds",
        description="Means and spread over training seeds, and whether a gap says anything. "
        "Example: dit-fast compare runs/pair --by method --metric FD-EffLite0",
    )
    comparing.set_defaults(run=_compare)
    comparing.add_argument(
        "folders", metavar="RUN", type=Path, nargs="+", help="run folders, or folders that hold runs"
    )
    comparing.add_argument(
        "--by", action="append", default=[], metavar="KEY",
        help="a key, or a group of keys, whose values make the groups (method, model.skip_wiring, optimizer, ...); may "
        "be repeated (default: all in which the runs differ)",
    )  # fmt: skip
    comparing.add_argument(
        "--metric", action="append", default=[], help="may be repeated (default: all that are shared)"
    )
    comparing.add_argument("--step", type=int, help="of the weights (default: the last at which all were evaluated)")
    comparing.add_argument("--baseline", metavar="GROUP", help="what the others are compared with (default: the first)")
    comparing.add_argument(
        "--margin", type=float, help="gap, as a share of the mean, below which nothing is said (default: 0.013)"
    )
    comparing.add_argument("--out", type=Path, metavar="FILE", help="also write all of it as JSON")


def _watch(options: argparse.Namespace) -> int:
    from dit_fast.errors import UserError
    from dit_fast.report.watch import watch

    if not 0.1 <= options.every <= 86400:
        raise UserError(f"--every {options.every:g} must lie in [0.1, 86400]")
    return watch(options.folder, options.every, options.once)


def _compare(options: argparse.Namespace) -> int:
    import json

    from dit_fast import files
    from dit_fast.report.comparison import MARGIN, compare, text
    from dit_fast.sampling.output import check_writable, writing

    if options.out:
        check_writable(options.out.parent)
    margin = MARGIN if options.margin is None else options.margin
    found = compare(options.folders, options.by, options.metric, options.step, options.baseline, margin)
    print("\n\n".join(text(comparison) for comparison in found))
    if options.out:
        with writing(options.out):
            files.replace(options.out, f"{json.dumps([each.json() for each in found], indent=1)}\n".encode())
    return 0


def _report(options: argparse.Namespace) -> int:
    from dit_fast.report.build import write_report

    runs = [*options.folders, *([options.baseline] if options.baseline else [])]
    out = options.out or runs[0] / "report"
    print(write_report(runs, out, options.note, options.data))
    return 0
