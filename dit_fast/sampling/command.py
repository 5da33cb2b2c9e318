"""`dit-fast sample RUN`: its options are the fields of `SampleOptions`."""

import argparse
import types
import typing
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dit_fast.errors import UserError

if TYPE_CHECKING:
    from dit_fast.data import DatasetInfo
    from dit_fast.sampling.parts import Parts

FLAGS = {"chunk": "--batch"}  # where the command has another name for an option
LISTS = {"classes": (int, "whole numbers", "0,3,7"), "time_range": (float, "numbers", "0.999,0.001")}


def add_commands(subparsers: Any) -> None:
    """Adds the command; it sets `run`, a function of the parsed options."""
    drawing = subparsers.add_parser("sample", help="draw images from a run's weights")
    drawing.set_defaults(run=_sample)
    drawing.add_argument("folder", metavar="RUN", type=Path, help="run folder")
    drawing.add_argument("--data", help="where the run's data set lies now, if it moved")
    drawing.add_argument(
        "-o",
        "--out",
        type=Path,
        help="FILE.npz, FILE.png or a folder for one .npz per chunk (default: samples.npz and samples.png in RUN); the "
        "same command, started again after a kill, draws what is missing",
    )
    drawing.fill = _add_options


def _add_options(parser: argparse.ArgumentParser) -> None:
    from dit_fast.sampling.options import SampleOptions

    hints = typing.get_type_hints(SampleOptions)
    for item in fields(SampleOptions):
        hint, default = hints[item.name], item.default
        optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kind = next(kind for kind in typing.get_args(hint) if kind is not type(None)) if optional else hint
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        shown = "" if default in (None, ()) else f" (default: {default})"
        parser.add_argument(
            FLAGS.get(item.name, f"--{item.name.replace('_', '-')}"),
            dest=item.name,
            type=str if choices or item.name in LISTS else kind,
            metavar="{" + ",".join(choices) + "}" if choices else None,
            default=argparse.SUPPRESS,
            help=item.metadata["text"] + shown,
        )


def _sample(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from dit_fast.checkpoint.run import load_run
    from dit_fast.checkpoint.step import FOLDER
    from dit_fast.sampling.images import sample_images
    from dit_fast.sampling.options import SampleOptions
    from dit_fast.sampling.output import check_writable, writing
    from dit_fast.sampling.parts import Parts
    from dit_fast.sampling.samples import FILE_NAME
    from dit_fast.world import here, meet

    outputs = [options.out] if options.out else [options.folder / FILE_NAME, options.folder / "samples.png"]
    kept = options.out is not None and (options.out.is_dir() or not options.out.suffix)
    if not kept and outputs[0].suffix not in (".png", ".npz"):
        raise UserError(f"--out {outputs[0]}: the name must end in .png or .npz, or have no ending (a folder)")
    names = {item.name for item in fields(SampleOptions)}
    given = {name: value for name, value in vars(options).items() if name in names}
    chosen = SampleOptions(**{name: _list(name, value) if name in LISTS else value for name, value in given.items()})
    world, run = here(), load_run(options.folder, weights=chosen.weights)
    if not options.out and not (options.folder / FOLDER).is_dir():
        raise UserError(f"{options.folder}: is a checkpoint, which stays as it is; name a file with --out")
    place = outputs[0] if kept else outputs[0].with_name(f"{outputs[0].name}.parts")
    check_writable(place.parent)
    dataset = run.dataset(options.data)
    chosen = chosen.resolved(run, dataset)
    with writing(place):
        parts = Parts(place, run, chosen, world.rank)
        done, there = parts.done(), parts.images()
    images = sample_images(run, chosen, world, dataset, done=done)
    if not kept:
        meet()  # rank 0 will remove the parts, and a rank that comes after that would draw its share again
    hidden = True if world.rank else None
    with tqdm(total=chosen.count, initial=there, desc="sampling", unit="image", disable=hidden) as bar:
        try:
            for samples in images:
                with writing(place):
                    parts.add(samples)
                if not world.rank:
                    bar.update(parts.images() - bar.n)
        except UserError:
            with writing(place):
                parts.give_up()
            raise
    if world.rank:
        return 0
    for path in outputs:
        with writing(path):
            _write(path, parts, dataset.info, kept)
        print(path)
    if not kept:
        parts.remove()
    return 0


def _write(path: Path, parts: "Parts", info: "DatasetInfo", kept: bool) -> None:
    from dit_fast.sampling.grids import class_grid, save_png
    from dit_fast.sampling.samples import Samples, write_samples

    if kept:
        for _ in parts:
            pass
    elif path.suffix == ".npz":
        write_samples(path, parts, parts.options.count)
    else:
        drawn = Samples.join(parts)
        columns = {drawn.text: (drawn.images, drawn.labels)}
        save_png(class_grid(columns, list(dict.fromkeys(drawn.labels.tolist())), info.class_names), path)


def _list(name: str, text: str) -> Any:
    kind, what, example = LISTS[name]
    try:
        return tuple(kind(item) for item in text.split(",")) if text.strip() else ()
    except ValueError:
        flag = f"--{name.replace('_', '-')}"
        raise UserError(f"{flag} {text}: expected {what} with commas between, e.g. {example}") from None
