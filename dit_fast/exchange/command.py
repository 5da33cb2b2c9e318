"""`dit-fast export RUN OUT` and `dit-fast export ops OUT`."""

import argparse
from pathlib import Path
from typing import Any

ELSEWHERE = "name another OUT"


def add_commands(subparsers: Any) -> None:
    """Adds the command; it sets `run`, a function of the parsed options."""
    exporting = subparsers.add_parser(
        "export",
        help="write a run's weights as files that other tools load",
        description="A folder for diffusers, with a model card, or the published codes' checkpoint. "
        "Examples: dit-fast export RUN my-model (a folder); dit-fast export RUN model.safetensors --family repa; "
        "dit-fast export ops my-ops (a repository of Hugging Face's kernels)",
    )
    exporting.set_defaults(run=_export)
    exporting.add_argument("folder", metavar="RUN", type=Path, help="run folder, one of its checkpoints, or: ops")
    exporting.add_argument("out", metavar="OUT", type=Path, help="a new FILE.safetensors or FILE.pt, or a new folder")
    exporting.add_argument("--family", help="of a file: whose names (default: as the model is; docs/sampling.md)")
    exporting.add_argument("--weights", choices=("ema", "model"), help="averaged or raw (default: ema)")
    exporting.add_argument("--data", help="of a folder: where the run's data set lies now, if it moved")


def _export(options: argparse.Namespace) -> int:
    from dit_fast.checkpoint import save_official
    from dit_fast.checkpoint.run import load_run
    from dit_fast.errors import UserError
    from dit_fast.exchange.folder import header, write_folder
    from dit_fast.sampling.options import SampleOptions, Weights
    from dit_fast.sampling.output import check_writable, writing

    out: Path = options.out
    if options.folder == Path("ops") and not options.folder.exists():
        return _export_ops(options)
    for flag, value, kind in (("--family", options.family, "a file"), ("--data", options.data, "a folder")):
        if value is not None and (kind == "a file") != bool(out.suffix):
            raise UserError(f"{flag} is for {kind}, and {out} is {'a file' if out.suffix else 'a folder'}; drop it")
    if out.suffix and out.suffix not in (".pt", ".safetensors"):
        raise UserError(f"{out}: a file's name must end in .pt or .safetensors, and a folder's has no dot; {ELSEWHERE}")
    if out.suffix and out.exists():
        raise UserError(f"{out}: exists already; name a new file")
    check_writable(out.parent, ELSEWHERE)
    weights: Weights = options.weights or "ema"
    run = load_run(options.folder, weights=weights)
    with writing(out, ELSEWHERE):
        if out.suffix:
            out.parent.mkdir(parents=True, exist_ok=True)
            save_official(run.model, out, options.family, header(run))
            print(out)
        else:
            dataset = run.dataset(options.data)
            name = write_folder(run, options.folder, out, dataset, SampleOptions(weights=weights))
            print(f"{out} ({name})")
    return 0


def _export_ops(options: argparse.Namespace) -> int:
    from dit_fast.errors import UserError
    from dit_fast.exchange.kernel_folder import write_kernels
    from dit_fast.sampling.output import check_writable, writing

    if options.family or options.data or options.weights:
        raise UserError("--family, --data and --weights are for runs; `export ops` takes a folder alone")
    if options.out.suffix in (".pt", ".safetensors"):
        raise UserError(f"{options.out}: the ops are a folder, not a file of weights; {ELSEWHERE}")
    check_writable(options.out.parent, ELSEWHERE)
    with writing(options.out, ELSEWHERE):
        print(f"{options.out} ({write_kernels(options.out)} modules)")
    return 0
