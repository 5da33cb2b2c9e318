"""`dit-fast bench NAME ... | all | report | curves`, also `python -m dit_fast.benchmarks`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

SIDES = ("plain", "types", "graph", "compiled", "diffusion-bench")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 if a benchmark's gate is red; 2 for errors of use, printed as one line."""
    parser = _parser()
    options = parser.parse_args(argv)
    # Both are read when torch is imported; the second silences the profiler that counts memory.
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")

    import torch

    from dit_fast.benchmarks.cases.case import Setting
    from dit_fast.benchmarks.curves import record_curves
    from dit_fast.benchmarks.gate import RedGate
    from dit_fast.benchmarks.report import report
    from dit_fast.benchmarks.results import RESULTS, device_of
    from dit_fast.benchmarks.run import NAMES, run
    from dit_fast.benchmarks.step import StepSetting, warm
    from dit_fast.errors import UserError

    folder = options.out or RESULTS
    options.overrides = [name for name in options.names if "=" in name]
    given = [name for name in options.names if "=" not in name]
    names = list(NAMES) if given == ["all"] else given
    status = 0
    try:
        if names == ["report"]:
            report(folder)
            return 0
        torch.set_num_threads(options.threads)
        if names == ["curves"]:
            record_curves(options.data, folder / "cpu" / "curves", options.only, options.commit)
            return 0
        setting = Setting(device_of(options.device), options.small)
        whole = StepSetting(
            setting.device, setting.small, tuple(options.sides), tuple(options.overrides), tuple(options.model),
            tuple(options.batch), tuple(options.precision), tuple(options.pixels),
        )  # fmt: skip
        if names != ["step"] and (whole.chosen or options.once):
            raise UserError(
                "key=value, --model, --batch, --precision, --pixels, --sides and --once are for `step` alone"
            )
        if options.once:
            warm(whole)
            return 0
        for name in names:
            try:
                run(
                    name,
                    whole if name == "step" else setting,
                    folder,
                    budget=options.budget,
                    record=options.tested,
                    commit=options.commit,
                )
            except RedGate as error:
                print(f"dit-fast bench: {error}", file=sys.stderr)
                status = 1
    except UserError as error:
        print(f"dit-fast bench: error: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dit-fast bench",
        description="Measure ops against their baselines, after their tests, into benchmarks/results/<device>/.",
        epilog="example: dit-fast bench step --device cpu --model S/2 --batch 8 --sides plain compiled",
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="an op, step (with key=value for our sides), all, report (tables and roofline), or curves",
    )
    step = parser.add_argument_group("step", "every combination of these instead of the usual cases")
    step.add_argument("--model", nargs="+", default=[], metavar="SIZE", help="S/2, B/2, L/2, XL/2 ...")
    step.add_argument("--batch", nargs="+", default=[], type=int, metavar="N", help="samples per step")
    step.add_argument("--precision", nargs="+", default=[], choices=["bf16", "fp32"])
    step.add_argument("--pixels", nargs="+", default=[], type=int, metavar="N", help="of the images: 256, 512")
    step.add_argument("--sides", nargs="+", default=["plain", "compiled"], choices=list(SIDES), help="what is compared")
    step.add_argument("--once", action="store_true", help="one step of each side, to fill caches; measures nothing")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds per benchmark, without its tests")
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads")
    parser.add_argument("--out", type=Path, help="folder for results instead of benchmarks/results")
    parser.add_argument("--small", action="store_true", help="tiny shapes: a check of the harness, no measurement")
    parser.add_argument(
        "--tested", type=Path, metavar="XML", help="--junitxml of a pytest run to go by, or a folder of them"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="RECIPE", help="curves: of these recipes alone")
    parser.add_argument(
        "--data", default="runs/quickstart/shards", help="curves: Twemoji shards, see docs/benchmarks.md"
    )
    parser.add_argument("--commit", help="recorded where there is no git history")
    return parser


if __name__ == "__main__":
    sys.exit(main())
