"""`dit-fast sample RUN`: its options are the fields of `SampleOptions`."""

import argparse
import sys
import time
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dit_fast.display import rate
from dit_fast.errors import UserError
from dit_fast.sampling.output import check_writable, writing

if TYPE_CHECKING:
    from dit_fast.data import LatentDataset
    from dit_fast.sampling.images import Drawing
    from dit_fast.sampling.parts import Parts
    from dit_fast.sampling.samples import Samples
    from dit_fast.world import World

ENDINGS = (".npz", ".tar", ".png")
LOOK, POLL = 10.0, 0.5  # seconds between looks for the chunks of other ranks: while drawing, and while waiting
FLAGS = {"chunk": "--batch"}  # where the command has another name for an option
LISTS = {"classes": (int, "whole numbers", "0,3,7"), "time_range": (float, "numbers", "0.999,0.001")}


def add_commands(subparsers: Any) -> None:
    """Adds the command; it sets `run`, a function of the parsed options."""
    drawing = subparsers.add_parser(
        "sample",
        help="draw images from a run's weights",
        epilog="example: dit-fast sample runs/b2 --count 50000 --labels random --batch 64 --out images.npz",
    )
    drawing.set_defaults(run=_sample)
    drawing.add_argument("folder", metavar="RUN", type=Path, help="run folder")
    drawing.add_argument("--data", help="where the run's data set lies now, if it moved")
    drawing.add_argument(
        "-o",
        "--out",
        type=Path,
        help="FILE.npz, FILE.tar (WebDataset), FILE.png (a sheet with a row for each class) or a folder for PNG files "
        "(default: samples.npz and samples.png in RUN); the same command, started again after a kill, draws what is "
        "missing",
    )
    pictures = drawing.add_mutually_exclusive_group()
    pictures.add_argument(
        "--interpolate",
        nargs=2,
        type=int,
        metavar=("A", "B"),
        help="a picture instead: --per-class images of each class from seed A's noise to seed B's",
    )
    pictures.add_argument(
        "--strips",
        type=int,
        metavar="N",
        help="a picture instead: what is predicted at N times, a row for each class",
    )
    pictures.add_argument(
        "--latents",
        action="store_true",
        help="latents instead, float32 [N, C, h, w], unscaled as an autoencoder takes them, into --out FILE.npz; for "
        "runs whose shards name no autoencoder",
    )
    drawing.fill = add_options


def add_options(parser: argparse.ArgumentParser, texts: Collection[str] = ()) -> None:
    """Adds an option for every field of `SampleOptions`. texts: names of those whose value the caller reads itself."""
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
            type=str if choices or item.name in (*LISTS, *texts) else kind,
            metavar="{" + ",".join(choices) + "}" if choices else None,
            default=argparse.SUPPRESS,
            help=item.metadata["text"] + shown,
        )


def given_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those of `SampleOptions` that were given, by name."""
    from dit_fast.sampling.options import SampleOptions

    names = {item.name for item in fields(SampleOptions)}
    given = {name: value for name, value in vars(options).items() if name in names}
    return {name: _list(name, value) if name in LISTS else value for name, value in given.items()}


def _sample(options: argparse.Namespace) -> int:
    from dit_fast.checkpoint.run import load_run
    from dit_fast.checkpoint.step import FOLDER
    from dit_fast.sampling.images import Drawing, decoder
    from dit_fast.sampling.options import SampleOptions
    from dit_fast.sampling.samples import FILE_NAME
    from dit_fast.world import here

    picture = "interpolation" if options.interpolate else "strips" if options.strips is not None else None
    outputs = [options.folder / FILE_NAME, options.folder / "samples.png"]
    outputs = [options.out] if options.out else [options.folder / f"{picture}.png"] if picture else outputs
    kept = options.out is not None and (options.out.is_dir() or not options.out.suffix)
    if not kept and outputs[0].suffix not in ENDINGS:
        valid = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
        raise UserError(f"--out {outputs[0]}: the name must end in {valid}, or have no ending (a folder)")
    if picture and (kept or outputs[0].suffix != ".png"):
        raise UserError(f"--out {outputs[0]}: a picture; its name must end in .png")
    given = given_options(options)
    if options.latents and (not options.out or kept or outputs[0].suffix != ".npz"):
        raise UserError("--latents: name a file for them, --out FILE.npz")
    if options.latents and "autoencoder" in given:
        raise UserError("--latents decodes nothing; drop --autoencoder")
    if options.interpolate and "seed" in given:
        raise UserError("--interpolate names two seeds; drop --seed")
    if options.strips is not None and "per_class" in given:
        raise UserError("--strips shows one image of each class; drop --per-class")
    chosen = SampleOptions(**given)
    world, run = here(), load_run(options.folder, weights=chosen.weights)
    if not options.out and not (options.folder / FOLDER).is_dir():
        raise UserError(f"{options.folder}: is a checkpoint, which stays as it is; name a file with --out")
    check_writable(outputs[0].parent)
    dataset = run.dataset(options.data)
    chosen = chosen.resolved(run, dataset)
    latents = options.latents
    drawing = Drawing(run, chosen, world.device, dataset, None if latents else decoder(run, chosen, dataset), latents)
    if not picture:
        _write_images(drawing, dataset, world, outputs, kept)
    elif not world.rank:
        _write_picture(drawing, dataset.info.class_names, options, outputs[0])
    return 0


def _write_picture(drawing: "Drawing", names: Sequence[str], options: argparse.Namespace, path: Path) -> None:
    from dit_fast.sampling.grids import save_png
    from dit_fast.sampling.sheets import interpolation, strips

    seeds, times = options.interpolate, options.strips
    sheet = interpolation(drawing, seeds, names) if seeds else strips(drawing, times, names)
    with writing(path):
        save_png(sheet, path)
    print(path)


def _write_images(
    drawing: "Drawing", dataset: "LatentDataset", world: "World", outputs: Sequence[Path], kept: bool
) -> None:
    from dit_fast.sampling.forms import LatentParts, NpzParts, PngFolder, TarParts
    from dit_fast.sampling.grids import class_grid, save_png
    from dit_fast.sampling.images import sample_images
    from dit_fast.sampling.samples import Samples
    from dit_fast.world import meet

    run, options = drawing.run, drawing.options
    place = outputs[0] if kept else outputs[0].with_name(f"{outputs[0].name}.parts")
    with writing(place):
        decoder = drawing.autoencoder
        one = TarParts if outputs[0].suffix == ".tar" else NpzParts if decoder else LatentParts
        form: type[Parts] = PngFolder if kept else one
        parts = form(place, run, options, world.rank, decoder.identity if decoder and options.autoencoder else None)
        done = parts.done()
    images = sample_images(run, options, world, dataset, decoder, done, latents=decoder is None)
    if not kept:
        meet()  # rank 0 will remove the parts, and a rank that comes after that would draw its share again
    _draw(parts, images, world)
    if world.rank:
        return
    for path in outputs:
        with writing(path):
            if path.suffix == ".png" and isinstance(parts, NpzParts):
                drawn = Samples.join(parts)
                columns = {drawn.text: (drawn.images, drawn.labels)}
                classes = list(dict.fromkeys(drawn.labels.tolist()))
                save_png(class_grid(columns, classes, dataset.info.class_names), path)
            else:
                parts.write(path)
        print(path)
    if not kept:
        parts.remove()


def _draw(parts: "Parts", images: Iterator["Samples"], world: "World") -> None:
    """Adds this rank's images. Rank 0 returns when those of all ranks are there, and says how fast they came."""
    from tqdm import tqdm

    total, there, began, looked = parts.options.total, parts.images(), time.monotonic(), 0.0
    with tqdm(total=total, initial=there, desc="sampling", unit="image", disable=True if world.rank else None) as bar:
        try:
            for samples in images:
                with writing(parts.folder):
                    parts.add(samples)
                if world.size == 1:
                    bar.update(len(samples.images))
                elif not world.rank and time.monotonic() > looked + LOOK:  # a folder may have many files
                    bar.update(parts.images() - bar.n)
                    looked = time.monotonic()
        except UserError:
            with writing(parts.folder):
                parts.give_up()
            raise
        while world.size > 1 and not world.rank and (now := parts.images()) < total:
            bar.update(now - bar.n)
            time.sleep(POLL)
    seconds = time.monotonic() - began
    if not world.rank:
        speed = f" in {tqdm.format_interval(seconds)}, {rate((total - there) / seconds)} images/s" * (there < total)
        print(f"dit-fast: {total - there:,} of {total:,} images drawn{speed}", file=sys.stderr)


def _list(name: str, text: str) -> Any:
    kind, what, example = LISTS[name]
    try:
        return tuple(kind(item) for item in text.split(",")) if text.strip() else ()
    except ValueError:
        flag = f"--{name.replace('_', '-')}"
        raise UserError(f"{flag} {text}: expected {what} with commas between, e.g. {example}") from None
