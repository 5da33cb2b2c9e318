"""The words of a report, put around its figures. Every number in it was logged by the run or computed here."""

from collections.abc import Mapping, Sequence

import numpy as np

from dit_fast import __version__
from dit_fast.analysis.figures import off_diagonal
from dit_fast.data import DatasetInfo
from dit_fast.display import percent, rate
from dit_fast.report.html import Page, Picture, Section
from dit_fast.report.machine import machine_facts
from dit_fast.report.reference import ALARM, WINDOW
from dit_fast.report.story import RunStory


def compose(
    stories: Sequence[RunStory], info: DatasetInfo, pictures: Mapping[str, bytes], notes: Sequence[str]
) -> Page:
    """The page about one run, or about a run and its baseline."""
    main = stories[0]
    compared = f" beside {stories[1].name}" if len(stories) > 1 else ""
    sections = [
        _what_you_see(main),
        _samples(stories, info, pictures["samples"]),
        _curves(stories, pictures["loss"]),
        _reference(stories, pictures.get("reference")),
        *([_diversity(main, pictures["diversity"])] if "diversity" in pictures else []),
        _similarity(stories, pictures["similarity"]),
        _throughput(stories, pictures["throughput"]),
        _next_steps(main),
    ]
    return Page(
        title=f"{main.name} on {info.num_classes} classes",
        lead=f"{main.config['model']['name']}{compared}: {main.steps:,} steps on {info.num_samples:,} images.",
        facts=_facts(main, info),
        sections=sections,
        notes=notes,
        footer=f"Made by dit_fast {__version__} from {main.folder}.",
    )


def _facts(main: RunStory, info: DatasetInfo) -> list[tuple[str, str]]:
    batch = main.config["engine"]["global_batch"]
    return [
        ("parameters", f"{main.blocks.parameters / 1e6:.2f} M"),
        ("latents", f"{info.channels} x {info.size} x {info.size}"),
        ("image passes", f"{main.steps * batch:,}"),
        ("loss at the end", f"{main.final(main.curve.column):.3f}"),
        ("samples per second", rate(main.median("samples_per_s"))),
    ]


def _what_you_see(main: RunStory) -> Section:
    model, methods = main.config["model"], main.config["methods"]
    told = {
        "long skip connections carry early block outputs to late blocks": model.get("skip_wiring", "off") != "off",
        "a diversity loss keeps the blocks from doing the same work": "diversedit" in methods,
        "one block is aligned with the features of a frozen image encoder": bool(
            {"repa", "repa_e", "reg", "haste"} & {*methods}
        ),
        "the autoencoder is trained with the model, by that alignment too": "repa_e" in methods,
        "attention of several blocks follows that of the encoder, up to a step": "haste" in methods,
        "that encoder's class token is denoised beside the image": "reg" in methods,
        "one block is aligned with a later block of the model's own average, at less noise": "sra" in methods,
        "the samples of a batch are pushed apart in the output of one block": "dispersive" in methods,
        "one block is aligned with a deeper one of the same forward": "layersync" in methods,
        "a head on a shallow block predicts the clean latent": "sra2" in methods,
        "a second head on an earlier block learns the same, and samples may be led away from it": "internal_guidance"
        in methods,
        "predictions are pushed away from the targets of other samples": "contrastive_flow" in methods,
        "a shallow block learns to predict by itself": "structure_guidance" in methods,
        "one block follows the guided features of a frozen model of a first stage": "self_transcendence" in methods,
        "it learned mean velocities, for samples in one step": "mean_flow" in main.config["objective"]["name"],
        "it is told how strongly to follow the class": model.get("guidance_condition", False),
        "it learned noise and its variance, in 1000 steps": main.config["objective"]["name"] == "ddpm",
    }
    extras = [text for text, holds in told.items() if holds]
    return Section(
        "What you see",
        [
            "A diffusion transformer learned to turn noise into images of a class it is told. It never sees pixels: "
            "an autoencoder shrinks each image to a small grid of numbers (the latent), the transformer learns how "
            "latents flow from noise to data, and the decoder paints the result.",
            *([f"What sets this run apart: {'; '.join(extras)}."] if extras else []),
        ],
    )


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
    ends = ", ".join(f"{story.name} {story.final(story.curve.column):.4f}" for story in stories)
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


def _diversity(main: RunStory, png: bytes) -> Section:
    settings = main.config["methods"]["diversedit"]
    steps, weight = main.metrics.column("diversedit/weight")
    share = float(np.mean(weight > 0)) if len(weight) else 0.0
    acting = "never acted"
    if share > 0:
        top = int(np.argmax(weight))
        acting = f"acted in {share:.0%} of the logged steps, most at step {steps[top]:,} ({weight[top]:.2g})"
    return Section(
        "Diversity between blocks",
        [
            "The diversity loss adds up how parallel the blocks' mean features are (orthogonality), how alike their "
            "tokens are (mutual information) and how evenly channels are used (dispersion). Its weight is adaptive: it "
            "acts while blocks are too alike and lets go when they differ enough.",
            f"Here the weight ({settings['weight']}) {acting}; the loss over the last tenth of the run was "
            f"{main.final('diversedit/total'):.3f}.",
        ],
        [Picture(png, "Diversity loss, its terms and its weight", "Shaded: steps at which the weight is above zero.")],
    )


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
        table=rows,
    )


def _throughput(stories: Sequence[RunStory], png: bytes) -> Section:
    engine = stories[0].config["engine"]
    rows = [["", ""], *([name, value] for name, value in machine_facts())]
    rows += [["precision", engine["precision"]], ["ZeRO stage", str(engine["zero_stage"])]]
    for story in stories:
        mfu = story.median("mfu")
        used = f", MFU {percent(mfu)}" if np.isfinite(mfu) else ""
        rows.append([story.name, f"median {rate(story.median('samples_per_s'))} samples/s{used}"])
    return Section(
        "Throughput",
        [
            "All processes together, forward, backward and update. MFU compares with the matrix products this machine "
            "was seen to reach when the run began. The machine named below is the one that wrote this report."
        ],
        [Picture(png, "Samples per second against step")],
        table=rows,
    )


def _next_steps(main: RunStory) -> Section:
    run = str(main.folder)
    return Section(
        "What to try next",
        commands=[
            ("More images of three classes, with stronger guidance:",
             f"dit-fast sample {run} --classes 0,1,2 --per-class 16 --cfg-scale 4 --out more.png"),
            ("The stochastic sampler of the paper:",
             f"dit-fast sample {run} --sampler sde --num-steps 100 --out sde.png"),
            ("The plain model with the same budget beside this one:", "make quickstart BASELINE=1"),
            ("Other data: colour emoji, or your own folder with one sub-folder per class:",
             "make quickstart DATA=path/to/folder OUT=runs/mine"),
            ("Any setting of a run is one key (dit-fast train --help lists the recipes):",
             "dit-fast train quickstart run.dir=runs/longer run.steps=5000 optimizer.ema_decay=0.998"),
        ],
    )  # fmt: skip
