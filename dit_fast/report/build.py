"""From run folders to `report.html` and its pictures."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dit_fast import files
from dit_fast.analysis.figures import heat_maps, to_png
from dit_fast.checkpoint.run import refuse_runs_inside
from dit_fast.data import LatentDataset
from dit_fast.errors import UserError
from dit_fast.report import figures
from dit_fast.report.html import render
from dit_fast.report.metrics import read_metrics
from dit_fast.report.page import compose, panels
from dit_fast.report.real import real_images
from dit_fast.report.story import RunStory, read_story
from dit_fast.sampling.grids import class_grid
from dit_fast.sampling.output import check_writable, writing

REAL_PER_CLASS = 5
PER_CLASS = 4  # of each run, where there are more than two


def write_report(
    runs: Sequence[Path],
    out: Path,
    notes: Sequence[str] = (),
    data: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Writes `out/report.html` and its pictures beside it as PNG; returns the page's path.

    runs: of the same data; the first is shown whole, the others beside it. notes: remarks shown at the top. data: where
    the data set lies now, if it moved. say: told whether each run lies on its reference curve.
    Raises UserError naming what is missing in a run folder, a run that is named twice, or one of other data.
    """
    check_writable(out)
    first, *others = runs
    for number, folder in enumerate(runs):
        if folder.resolve() in [other.resolve() for other in runs[:number]]:
            raise UserError(f"{folder}: is named twice; name another run")
        refuse_runs_inside(folder)
        read_metrics(folder)  # a wrong folder is found before minutes are spent on the other ones
    stories = [read_story(first, data=data)]
    dataset = stories[0].dataset
    for folder in others:
        try:
            stories.append(read_story(folder, stories[0].samples, dataset.root))
        except UserError as error:
            raise UserError(f"{folder}, beside {first}: {error}") from None
    stories = _told_apart(stories)
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


def _told_apart(stories: Sequence[RunStory]) -> list[RunStory]:
    """With the ends of their folders behind names that two of them have."""
    found = []
    for story in stories:
        same = [other.folder for other in stories if other.name == story.name]
        if len(same) > 1:
            deepest = max(len(folder.parts) for folder in same)
            depth = next(n for n in range(1, deepest + 1) if len({folder.parts[-n:] for folder in same}) == len(same))
            story = replace(story, name=f"{story.name} ({'/'.join(story.folder.parts[-depth:])})")
        found.append(story)
    return found


def draw_pictures(stories: Sequence[RunStory], dataset: LatentDataset) -> dict[str, bytes]:
    """Name -> PNG of every picture of a report; one for each method of the first run that logged something."""
    main = stories[0]
    runs = {story.name: story.metrics for story in stories}
    axis = " / ".join(dict.fromkeys(story.curve.label for story in stories))
    drawn = {
        "loss": figures.loss_figure({story.name: story.metrics.column(story.curve.column) for story in stories}, axis),
        "similarity": heat_maps({story.name: story.blocks.cka["linear"] for story in stories}, "linear CKA"),
        "throughput": figures.throughput_figure(runs),
        **{name: figures.panel_figure(main.metrics, panel) for name, panel in panels(main).items()},
    }
    if main.verdict.bands:
        drawn["reference"] = figures.reference_figure(main.verdict.bands)
    return {"samples": _sample_grid(stories, dataset), **{name: to_png(item) for name, item in drawn.items()}}


def _sample_grid(stories: Sequence[RunStory], dataset: LatentDataset) -> bytes:
    classes = tuple(dict.fromkeys(stories[0].samples.labels.tolist()))
    columns = {"real": real_images(dataset, classes, REAL_PER_CLASS)}
    most = PER_CLASS if len(stories) > 2 else len(stories[0].samples.labels)
    for story in stories:
        labels = story.samples.labels
        shown = np.concatenate([np.flatnonzero(labels == label)[:most] for label in classes])
        columns[f"samples of {story.name}"] = (story.samples.images[shown], labels[shown])
    buffer = io.BytesIO()
    class_grid(columns, classes, dataset.info.class_names).save(buffer, format="PNG")
    return buffer.getvalue()
