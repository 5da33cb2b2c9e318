"""The words of a report, put around its figures. Every number in it was logged by the run or computed here."""

import json
from collections.abc import Mapping, Sequence

import numpy as np

from dit_fast import __version__
from dit_fast.analysis.figures import off_diagonal
from dit_fast.data import DatasetInfo
from dit_fast.display import percent, rate
from dit_fast.errors import UserError
from dit_fast.evaluation.records import read_evaluations
from dit_fast.methods import METHODS
from dit_fast.methods.base import Panel
from dit_fast.options import leaves
from dit_fast.report.comparison import FEWEST, MARGIN, Comparison, compare, share, tells
from dit_fast.report.html import Page, Picture, Section, Table
from dit_fast.report.machine import machine_facts
from dit_fast.report.reference import ALARM, WINDOW
from dit_fast.report.story import RunStory

PLACES = ("run.dir", "data.path")


def compose(
    stories: Sequence[RunStory], info: DatasetInfo, pictures: Mapping[str, bytes], notes: Sequence[str]
) -> Page:
    """The page about one run, or about several, of which the first is the one that the others are beside."""
    main = stories[0]
    beside = f" beside {', '.join(story.name for story in stories[1:])}" if len(stories) > 1 else ""
    sections = [
        _what_you_see(main),
        *_differences(stories),
        *_measured(stories),
        _samples(stories, info, pictures["samples"]),
        _curves(stories, pictures["loss"]),
        _reference(stories, pictures.get("reference")),
        *_panels(stories, pictures),
        _similarity(stories, pictures["similarity"]),
        *_analyses(stories),
        _throughput(stories, pictures["throughput"]),
        _next_steps(main),
    ]
    return Page(
        title=f"{main.name} on {info.num_classes} classes",
        lead=f"{main.config['model']['name']}{beside}: {main.steps:,} steps on {info.num_samples:,} images.",
        facts=_facts(main, info),
        sections=sections,
        notes=notes,
        footer=f"Made by dit_fast {__version__} from {', '.join(str(story.folder) for story in stories)}.",
    )


def _facts(main: RunStory, info: DatasetInfo) -> list[tuple[str, str]]:
    batch = main.config["engine"]["global_batch"]
    return [
        ("parameters", f"{main.blocks.parameters / 1e6:.2f} M"),
        ("latents", f"{info.channels} x {info.size} x {info.size}"),
        ("image passes", f"{main.steps * batch:,}"),
        ("loss at the end", f"{main.metrics.final(main.curve.column):.3f}"),
        ("samples per second", rate(main.metrics.median("samples_per_s"))),
    ]


def _what_you_see(main: RunStory) -> Section:
    model, objective = main.config["model"], main.config["objective"]["name"]
    extras = [METHODS[name].about for name in main.config["methods"]]
    told = {
        "long skip connections carry early block outputs to late blocks": model.get("skip_wiring", "off") != "off",
        "it learned mean velocities, for samples in one step": "mean_flow" in objective,
        "it is told how strongly to follow the class": model.get("guidance_condition", False),
        "it learned noise and its variance, in 1000 steps": objective == "ddpm",
    }
    extras = [text for text, holds in told.items() if holds] + extras
    return Section(
        "What you see",
        [
            "A diffusion transformer learned to turn noise into images of a class it is told. It never sees pixels: "
            "an autoencoder shrinks each image to a small grid of numbers (the latent), the transformer learns how "
            "latents flow from noise to data, and the decoder paints the result.",
            *([f"What sets this run apart: {'; '.join(extras)}."] if extras else []),
        ],
    )


def _differences(stories: Sequence[RunStory]) -> list[Section]:
    """Which settings are not the same in all runs."""
    if len(stories) < 2:
        return []
    flat = [dict(leaves(story.config)) for story in stories]
    rows = [["methods", *(", ".join(story.config["methods"]) or "none" for story in stories)]]
    for key in dict.fromkeys(key for values in flat for key in values):
        if key in (*PLACES, "methods") or (key.startswith("methods.") and not tells(key, flat)):
            continue
        rows.append([key, *(json.dumps(values[key]) if key in values else "-" for values in flat)])
    rows = [row for row in rows if len(set(row[1:])) > 1]
    head = ["setting", *(story.name for story in stories)]
    text = "Settings that are not the same in all." if rows else "All settings are the same, but for the folder."
    return [Section("What differs", [text], tables=[[head, *rows]] if rows else [])]


def _measured(stories: Sequence[RunStory]) -> list[Section]:
    """What `dit-fast evaluate` found, every number with its protocol."""
    if len(stories) > 1:
        try:
            found = compare([story.folder for story in stories])
        except UserError as error:
            return [Section("Measured", [f"Not compared: {error}."])]
        by_protocol: dict[str, list[str]] = {}
        for one in found:
            by_protocol.setdefault(one.protocol, []).append(one.metric)
        paragraphs = [
            "One line for runs that differ in their seeds alone. Nothing is said of a gap below "
            f"{MARGIN:.1%} or of fewer than {FEWEST} seeds a side.",
            *(f"{', '.join(dict.fromkeys(metrics))}: {protocol}." for protocol, metrics in by_protocol.items()),
        ]
        return [Section("Measured", paragraphs, tables=[_compared(one) for one in found])]
    evaluations = read_evaluations(stories[0].folder)
    if not evaluations:
        return []
    how = list(dict.fromkeys(each.protocol.text() for each in evaluations))
    metrics = list(dict.fromkeys(name for each in evaluations for name in each.values))
    numbered = len(how) > 1  # a protocol is told once, however many numbers it has
    paragraphs = [f"{number}: {text}." if numbered else f"{text}." for number, text in enumerate(how, 1)]
    rows = [["protocol"] * numbered + ["step", *metrics]]
    for each in evaluations:
        values = [f"{each.values[name]:.4g}" if name in each.values else "-" for name in metrics]
        number = str(how.index(each.protocol.text()) + 1)
        rows.append([number] * numbered + [f"{each.step:,}" if each.step is not None else "-", *values])
    return [Section("Measured", paragraphs, tables=[rows])]


def _compared(one: Comparison) -> Table:
    head = [f"{one.metric} at step {one.step:,}", "runs", "mean", "sd", "against the first"]
    rows = []
    for group in one.groups:
        gaps = [f"{share(gap)}: {gap.verdict}" for gap in one.differences if gap.group == group.name]
        sd = "-" if group.sd is None else f"{group.sd:.3g}"
        rows.append([group.name, str(len(group.values)), f"{group.mean:.4g}", sd, *(gaps or [""])])
    return [head, *rows]


def _panels(stories: Sequence[RunStory], pictures: Mapping[str, bytes]) -> list[Section]:
    """What the methods of the first run say of it."""
    sections = []
    whose = f" ({stories[0].name})" if len(stories) > 1 else ""
    for name, panel in panels(stories[0]).items():
        caption = "Shaded: steps at which the weight is above zero." if panel.weight else "As logged."
        picture = Picture(pictures[name], panel.title, caption)
        sections.append(Section(panel.title + whose, panel.paragraphs, [picture]))
    return sections


def panels(story: RunStory) -> dict[str, Panel]:
    """Of the methods of a run that logged something, by name."""
    methods = story.config["methods"]
    found = {name: METHODS[name].panel(settings, story.metrics) for name, settings in methods.items()}
    return {name: panel for name, panel in found.items() if panel is not None}


def _analyses(stories: Sequence[RunStory]) -> list[Section]:
    """Figures that `dit-fast analyse` left in the run folders."""
    pictures = [
        Picture(path.read_bytes(), path.stem.replace("_", " "), f"{story.name}: {path.stem.replace('_', ' ')}")
        for story in stories for path in sorted((story.folder / "analysis").glob("*.png"))
    ]  # fmt: skip
    return [Section("Analysis", ["Made by `dit-fast analyse`; the arrays lie beside."], pictures)] if pictures else []


def _samples(stories: Sequence[RunStory], info: DatasetInfo, png: bytes) -> Section:
    texts = [story.samples.text for story in stories]
    drawn = texts[0] if len(set(texts)) == 1 else "; ".join(f"{s.name}: {s.samples.text}" for s in stories)
    real = "as stored" if "image" in info.fields else "after a round trip through the autoencoder, the best it can show"
    return Section(
        "Samples beside real images",
        [
            "Each row is one class. Samples should plainly belong to their row, differ from each other, and not repeat "
            "the real images on the left."
        ],
        [
            Picture(
                png,
                "Real images and samples, one row per class",
                f"Real images {real}. Samples: {drawn}.",
            )
        ],
    )


def _curves(stories: Sequence[RunStory], png: bytes) -> Section:
    ends = ", ".join(f"{story.name} {story.metrics.final(story.curve.column):.4f}" for story in stories)
    return Section(
        "Learning curve",
        list(dict.fromkeys(story.curve.text for story in stories)),
        [
            Picture(
                png,
                "Loss against step",
                f"Mean over the last tenth of the run: {ends}. Thin: as logged; thick: smoothed.",
            )
        ],
    )


def _reference(stories: Sequence[RunStory], png: bytes | None) -> Section:
    named = [f"{story.name}: {story.verdict.text}" if len(stories) > 1 else story.verdict.text for story in stories]
    about = (
        "The bands lie around the means of recorded runs that differ in initial weights, order and noise. They are so "
        f"wide that one such run in {round(1 / ALARM)} would leave one somewhere, were points independent and normal."
    )
    caption = f"Line: this run, means over {WINDOW} steps or more. Shaded: the band. Dots: outside."
    pictures = [Picture(png, "Every logged quantity and its band", caption)] if png else []
    return Section("Reference curve", [*named, *([about] if png else [])], pictures)


def _similarity(stories: Sequence[RunStory], png: bytes) -> Section:
    rows = [["run", "mean CKA of different blocks", "mean token cosine", "effective rank, first to last block"]]
    for story in stories:
        rank = story.blocks.rank
        rows.append(
            [story.name, f"{off_diagonal(story.blocks.cka['linear']):.3f}", f"{off_diagonal(story.blocks.cosine):.3f}",
             f"{rank[0]:.0f} to {rank[-1]:.0f}"]
        )  # fmt: skip
    return Section(
        "How alike the blocks are",
        [
            "Each cell compares the features of two blocks on real images (linear CKA: 1 for the same representation "
            "up to rotation, 0 for unrelated ones). Large bright squares away from the diagonal are blocks that repeat "
            "each other."
        ],
        [Picture(png, "Similarity of every pair of blocks", "Averaged weights, the last noise level of the sampler.")],
        tables=[rows],
    )


def _throughput(stories: Sequence[RunStory], png: bytes) -> Section:
    engine = stories[0].config["engine"]
    rows = [["", ""], *([name, value] for name, value in machine_facts())]
    rows += [["precision", engine["precision"]], ["ZeRO stage", str(engine["zero_stage"])]]
    for story in stories:
        mfu = story.metrics.median("mfu")
        used = f", MFU {percent(mfu)}" if np.isfinite(mfu) else ""
        rows.append([story.name, f"median {rate(story.metrics.median('samples_per_s'))} samples/s{used}"])
    return Section(
        "Throughput",
        [
            "All processes together, forward, backward and update. MFU compares with the matrix products this machine "
            "was seen to reach when the run began. The machine named below is the one that wrote this report."
        ],
        [Picture(png, "Samples per second against step")],
        tables=[rows],
    )


def _next_steps(main: RunStory) -> Section:
    run = str(main.folder)
    sde = [
        ("The stochastic sampler of the paper:", f"dit-fast sample {run} --sampler sde --num-steps 100 --out sde.png")
    ]
    return Section(
        "What to try next",
        commands=[
            ("More images of three classes, with stronger guidance:",
             f"dit-fast sample {run} --classes 0,1,2 --per-class 16 --cfg-scale 4 --out more.png"),
            *(sde if main.config["objective"]["name"] == "flow" else []),  # others have samplers of their own
            ("The plain model with the same budget beside this one:", "make quickstart BASELINE=1"),
            ("Other data: colour emoji, or your own folder with one sub-folder per class:",
             "make quickstart DATA=path/to/folder OUT=runs/mine"),
            ("Any setting of a run is one key (dit-fast train --help lists the recipes):",
             "dit-fast train quickstart run.dir=runs/longer run.steps=5000 optimizer.ema_decay=0.998"),
        ],
    )  # fmt: skip
