"""Writes the long skip's dispatch table from measurements: `python -m dit_fast.benchmarks.tune RESULT.json ...`.

RESULT: benchmarks/results/<device>/long_skip.json of a GPU, one per architecture. Of each case the implementation with
the smaller median of forward + backward wins; entries of architectures that are not among the results stay.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_fast.benchmarks.cases.case import BOTH
from dit_fast.benchmarks.results import check
from dit_fast.errors import UserError
from dit_fast.ops.long_skip_table import FALLBACK, PATH, bucket, load

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
CHOICES = (FALLBACK, "triton")


def entries(result: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Table entries of one result; cases in which not both implementations ran are left out.

    Raises UserError for a result that is incomplete, of another op, not of a GPU, or without any such case.
    """
    check(result, where)
    arch = result["device"].get("arch")
    if result["benchmark"] != "long_skip" or arch is None:
        raise UserError(
            f"{where}: is not a result of long_skip on a GPU; run `python -m dit_fast.benchmarks long_skip`"
        )
    found = []
    for case in result["cases"]:
        sides = case["parts"][BOTH]["sides"]
        medians = {name: sides[f"dit_fast, {name}"]["median_s"] for name in CHOICES if f"dit_fast, {name}" in sides}
        if len(medians) == len(CHOICES):
            shape = case["shape"]
            found.append(
                {
                    "arch": arch,
                    "width": shape["width"],
                    "rows": bucket(shape["batch"] * shape["tokens"]),
                    "dtype": DTYPES[case["dtype"]],
                    "backend": min(medians, key=lambda name: medians[name]),
                }
            )
    if not found:
        raise UserError(f"{where}: no case has both {' and '.join(CHOICES)}; measure on a machine where both can run")
    return found


def merged(old: dict[str, Any], new: Sequence[dict[str, Any]], source: str) -> dict[str, Any]:
    """The table's new content: `new`, and what `old` holds of other architectures."""
    measured = {entry["arch"] for entry in new}
    kept = [entry for entry in old["entries"] if entry["arch"] not in measured]
    ordered = sorted([*kept, *new], key=lambda entry: [entry[name] for name in ("arch", "width", "rows", "dtype")])
    return {**old, "source": source, "entries": ordered}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 for errors of use, printed as one line; then the table is as it was."""
    parser = argparse.ArgumentParser(prog="python -m dit_fast.benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT")
    parser.add_argument("--out", type=Path, default=PATH, help="table to change (default: the one in this package)")
    options = parser.parse_args(argv)
    try:
        new = [entry for path in options.results for entry in entries(_read(path), str(path))]
        load(options.out)
        old = json.loads(options.out.read_text())
        source = ", ".join(f"{path.parent.name}/{path.name}" for path in options.results)
        partial = options.out.with_name(options.out.name + ".partial")
        partial.write_text(json.dumps(merged(old, new, source), indent=2) + "\n")
        load(partial)
        partial.replace(options.out)
    except UserError as error:
        print(f"dit-fast tune: error: {error}", file=sys.stderr)
        return 2
    for entry in new:
        print(f"{entry['arch']} D {entry['width']} M up to {entry['rows']} {entry['dtype']}: {entry['backend']}")
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None


if __name__ == "__main__":
    sys.exit(main())
