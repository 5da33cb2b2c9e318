"""`dit-fast sample RUN` and `dit-fast report RUN`."""

import argparse
from pathlib import Path
from typing import Any

from dit_fast.errors import UserError


def add_commands(subparsers: Any) -> None:
    """Adds both commands to the command line; each sets `run`, a function of the parsed options."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    drawing = subparsers.add_parser("sample", help="draw images from a run's weights", formatter_class=formatter)
    drawing.set_defaults(run=_sample)
    drawing.add_argument("folder", metavar="RUN", type=Path, help="run folder")
    drawing.add_argument("--classes", default="", help="labels, e.g. 0,3,7 (default: the first ten)")
    drawing.add_argument("--per-class", type=int, default=8, help="images of each class")
    drawing.add_argument(
        "--cfg-scale", type=float, help="guidance; 1 = off, 0 = no label (default: 2.5 if trained for it)"
    )
    drawing.add_argument("--guidance-low", type=float, default=0.0, help="guide only for t from here ...")
    drawing.add_argument("--guidance-high", type=float, default=1.0, help="... to here (1 is pure noise)")
    drawing.add_argument("--cfg-channels", choices=("all", "first_three"), help="guided channels (default: all)")
    drawing.add_argument("--sampler", default="heun", help="euler, heun or sde")
    drawing.add_argument("--num-steps", type=int, default=20, help="sampling steps")
    drawing.add_argument("--seed", type=int, default=0, help="image k depends on the seed, on k and on its class")
    drawing.add_argument("--weights", choices=("ema", "model"), default="ema", help="moving average or raw weights")
    drawing.add_argument("--batch", type=int, default=16, help="images computed together; equal values, equal bytes")
    drawing.add_argument("--data", help="where the run's data set lies now, if it moved")
    drawing.add_argument("--out", type=Path, help="FILE.png or FILE.npz (default: samples.png and samples.npz in RUN)")
    reporting = subparsers.add_parser("report", help="write report.html about a run", formatter_class=formatter)
    reporting.set_defaults(run=_report)
    reporting.add_argument("folder", metavar="RUN", type=Path, help="run folder")
    reporting.add_argument("--baseline", type=Path, help="a second run, shown beside the first")
    reporting.add_argument("--data", help="where the data set of both runs lies now, if it moved")
    reporting.add_argument("--out", type=Path, help="folder for report.html and its pictures (default: RUN/report)")
    reporting.add_argument("--note", action="append", default=[], help="a remark to show at the top; may be repeated")


def _sample(options: argparse.Namespace) -> int:
    from dit_fast.checkpoint.run import load_run
    from dit_fast.checkpoint.step import FOLDER
    from dit_fast.report.grids import class_grid, save_png
    from dit_fast.report.output import check_writable, writing
    from dit_fast.report.sampling import FILE_NAME, SampleOptions, draw_samples

    outputs = [options.out] if options.out else [options.folder / FILE_NAME, options.folder / "samples.png"]
    if outputs[0].suffix not in (".png", ".npz"):
        raise UserError(f"--out {outputs[0]}: the name must end in .png or .npz")
    chosen = SampleOptions(
        classes=_labels(options.classes),
        per_class=options.per_class,
        sampler=options.sampler,
        num_steps=options.num_steps,
        cfg_scale=options.cfg_scale,
        guidance_low=options.guidance_low,
        guidance_high=options.guidance_high,
        cfg_channels=options.cfg_channels,
        seed=options.seed,
        weights=options.weights,
        chunk=options.batch,
    )
    loaded = load_run(options.folder, weights=options.weights)
    if not options.out and not (options.folder / FOLDER).is_dir():
        raise UserError(f"{options.folder}: is a checkpoint, which stays as it is; name a file with --out")
    check_writable(outputs[0].parent)
    dataset = loaded.dataset(options.data)
    with _Bar("sampling") as bar:
        drawn = draw_samples(loaded, dataset, chosen, bar)
    classes = list(dict.fromkeys(drawn.labels.tolist()))
    for path in outputs:
        with writing(path):
            if path.suffix == ".npz":
                drawn.save(path)
            else:
                save_png(
                    class_grid({drawn.text: (drawn.images, drawn.labels)}, classes, dataset.info.class_names), path
                )
        print(path)
    return 0


def _report(options: argparse.Namespace) -> int:
    from dit_fast.report.build import write_report

    out = options.out or options.folder / "report"
    print(write_report(options.folder, options.baseline, out, options.note, options.data))
    return 0


def _labels(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(item) for item in text.split(",")) if text.strip() else ()
    except ValueError:
        raise UserError(f"--classes {text}: expected whole numbers with commas between, e.g. 0,3,7") from None


class _Bar:
    """A progress bar with the time left, as a callback (done, total); nothing is shown before the first call."""

    def __init__(self, title: str):
        self._title = title
        self._bar: Any = None

    def __enter__(self) -> "_Bar":
        return self

    def __call__(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=total, desc=self._title, unit="image", disable=None)
        self._bar.update(done - self._bar.n)

    def __exit__(self, *details: object) -> None:
        if self._bar is not None:
            self._bar.close()
