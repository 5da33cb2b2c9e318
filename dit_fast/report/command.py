"""`dit-fast report RUN`."""

import argparse
from pathlib import Path
from typing import Any


def add_commands(subparsers: Any) -> None:
    """Adds the command; it sets `run`, a function of the parsed options."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    reporting = subparsers.add_parser("report", help="write report.html about a run", formatter_class=formatter)
    reporting.set_defaults(run=_report)
    reporting.add_argument("folder", metavar="RUN", type=Path, help="run folder")
    reporting.add_argument("--baseline", type=Path, help="a second run, shown beside the first")
    reporting.add_argument("--data", help="where the data set of both runs lies now, if it moved")
    reporting.add_argument("--out", type=Path, help="folder for report.html and its pictures (default: RUN/report)")
    reporting.add_argument("--note", action="append", default=[], help="a remark to show at the top; may be repeated")


def _report(options: argparse.Namespace) -> int:
    from dit_fast.report.build import write_report

    out = options.out or options.folder / "report"
    print(write_report(options.folder, options.baseline, out, options.note, options.data))
    return 0
