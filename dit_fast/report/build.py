"""From run folders to `report.html` and its pictures."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dit_fast import files
from dit_fast.analysis.figures import heat_maps, to_png
from dit_fast.checkpoint.run import refuse_runs_inside
from dit_fast.data import LatentDataset
from dit_fast.errors import UserError
from dit_fast.report import figures
from dit_fast.report.html import render
from dit_fast.report.metrics import read_metrics
from dit_fast.report.page import compose
from dit_fast.report.real import real_images
from dit_fast.report.story import RunStory, read_story
from dit_fast.sampling.grids import class_grid
from dit_fast.sampling.output import check_writable, writing

REAL_PER_CLASS = 5


def write_report(
    run: Path,
    baseline: Path | None,
    out: Path,
    notes: Sequence[str] = (),
    data: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Writes `out/report.html` and its pictures beside it as PNG; returns the page's path.

    baseline: a second run on the same data, shown beside the first. notes: remarks shown at the top. data: where the
    data set lies now, if it moved. say: told whether each run lies on its reference curve.
    Raises UserError naming what is missing in a run folder, or a baseline that was trained on other data.
    """
    check_writable(out)
    if baseline is not None and baseline.resolve() == run.resolve():
        raise UserError(f"--baseline {baseline}: is the run itself; name another run")
    for folder in (run, baseline):
        if folder is not None:
            refuse_runs_inside(folder)
            read_metrics(folder)  # a wrong folder is found before minutes are spent on the other one
    stories = [read_story(run, data=data)]
    dataset = stories[0].dataset
    if baseline is not None:
        try:
            stories.append(read_story(baseline, stories[0].samples, dataset.root))
        except UserError as error:
            raise UserError(f"--baseline {baseline}: {error}") from None
        if stories[0].name == stories[1].name:
            distinct = run.name != baseline.name
            stories = [
                replace(story, name=f"{story.name} ({story.folder.name if distinct else story.folder})")
                for story in stories
            ]
    for story in stories:
        say(f"{story.folder}: {story.verdict.text}")
    pictures = draw_pictures(stories, dataset)
    page = render(compose(stories, dataset.info, pictures, notes)).encode(errors="replace")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, png in pictures.items():
            files.replace(out / f"{name}.png", png)
        files.replace(out / "report.html", page)
    return out / "report.html"


def draw_pictures(stories: Sequence[RunStory], dataset: LatentDataset) -> dict[str, bytes]:
    """Name -> PNG of every picture of a report; `diversity` and `reference` only where the first run has them."""
    main = stories[0]
    runs = {story.name: story.metrics for story in stories}
    axis = " / ".join(dict.fromkeys(story.curve.label for story in stories))
    drawn = {
        "loss": figures.loss_figure({story.name: story.metrics.column(story.curve.column) for story in stories}, axis),
        "similarity": heat_maps({story.name: story.blocks.cka["linear"] for story in stories}, "linear CKA"),
        "throughput": figures.throughput_figure(runs),
    }
    settings = main.config["methods"].get("diversedit")
    if settings is not None and main.metrics.has("diversedit/weight"):
        adaptive = settings["weight"] != "constant"
        limits = (settings["low"], settings["high"]) if adaptive else (None, None)
        drawn["diversity"] = figures.diversity_figure(main.metrics, *limits)
    if main.verdict.bands:
        drawn["reference"] = figures.reference_figure(main.verdict.bands)
    return {"samples": _sample_grid(stories, dataset), **{name: to_png(item) for name, item in drawn.items()}}


def _sample_grid(stories: Sequence[RunStory], dataset: LatentDataset) -> bytes:
    classes = tuple(dict.fromkeys(stories[0].samples.labels.tolist()))
    columns = {"real": real_images(dataset, classes, REAL_PER_CLASS)}
    for story in stories:
        columns[f"samples of {story.name}"] = (story.samples.images, story.samples.labels)
    buffer = io.BytesIO()
    class_grid(columns, classes, dataset.info.class_names).save(buffer, format="PNG")
    return buffer.getvalue()
