"""`dit-fast evaluate`: a run, or images in files, measured by a stated protocol."""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_fast.errors import UserError

if TYPE_CHECKING:
    from dit_fast.evaluation.evaluate import Evaluator, Step
    from dit_fast.evaluation.networks import Network
    from dit_fast.evaluation.records import Evaluation
    from dit_fast.world import World

logger = logging.getLogger("dit_fast")

COUNT = 50_000  # images of a run
MOST_SCALES = 1000
LOCK = "lock"
EXAMPLES = """Images are drawn as by `dit-fast sample`, with its options, but that --count is 50000 by default,
--cfg-scale may be FIRST:LAST:STEP, and labels are random with adm:FILE, else balanced.

examples:
  dit-fast evaluate RUN --network adm:classify_image_graph_def.pb --reference VIRTUAL_imagenet256_labeled.npz \\
      --sampler sde --num-steps 250 --cfg-scale 1.8 --guidance-high 0.7
  dit-fast evaluate RUN --count 5000 --cfg-scale 1:3:0.25     (the packaged network; a sweep of the guidance)
  dit-fast evaluate samples.npz --reference shards --network dinov2-vit-l:dinov2_vitl14_pretrain.pth
  dit-fast evaluate RUN --reach FID=20                        (the step at which the measured curve comes there)
"""


def add_commands(subparsers: Any) -> None:
    """Adds the command; it sets `run`, a function of the parsed options."""
    command = subparsers.add_parser(
        "evaluate",
        help="FID and its relatives of a run or of images, with their protocol",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    command.set_defaults(run=_evaluate)
    command.add_argument(
        "images", metavar="RUN|IMAGES", type=Path, help="run, a step folder in one, or images in files"
    )
    command.add_argument(
        "--network",
        action="append",
        default=[],
        metavar="SPEC",
        help="whose features are compared, may be repeated: adm:FILE or torch-fidelity:FILE (Inception's weights), "
        "efficientnet-lite0 (default), dinov2-vit-l:PATH, ...",
    )
    command.add_argument(
        "--reference",
        metavar="WHAT",
        help="an .npz of statistics (ADM's, torch-fidelity's), a folder, .npz or .tar of images, or a folder of shards "
        "(default: the data set of the run)",
    )
    command.add_argument(
        "--reference-count", type=int, metavar="N", help="images of shards, evenly spaced (default: all)"
    )
    command.add_argument("--metrics", metavar="LIST", help="of fd, sfd, is, pr, kd, mmd (default: usual ones)")
    command.add_argument("--data", help="where the run's data set lies now, if it moved")
    command.add_argument(
        "-o", "--out", type=Path, help="folder of evaluations.jsonl (default: the run, or beside images)"
    )
    command.add_argument(
        "--reach", metavar="METRIC=VALUE", help="measure nothing; say at which step a curve reached a value"
    )
    command.fill = _add_options


def _add_options(parser: argparse.ArgumentParser) -> None:
    from dit_fast.sampling.command import add_options

    add_options(parser, texts=("cfg_scale",))


def _evaluate(options: argparse.Namespace) -> int:
    from dit_fast.checkpoint.manifest import MANIFEST
    from dit_fast.checkpoint.step import FOLDER
    from dit_fast.evaluation.measure import check_metrics
    from dit_fast.evaluation.networks import NO_INCEPTION, PACKAGED, load_network
    from dit_fast.sampling.command import given_options
    from dit_fast.sampling.output import check_writable
    from dit_fast.world import here

    place, world = options.images, here()
    is_step = (place / MANIFEST).is_file()
    is_run = is_step or (place / FOLDER).is_dir()
    out = options.out or (place.absolute().parents[1] if is_step else place if is_run else place.absolute().parent)
    if options.reach:
        return _reach(out, options.reach)
    given = given_options(options)
    if not is_run and given:
        flag = next(iter(given)).replace("_", "-")
        raise UserError(f"--{flag} is for drawing, and {place} is no run; give the folder of a run, or drop it")
    check_writable(out)
    if not options.network and not world.rank:
        logger.warning(NO_INCEPTION)
    asked = [name.strip() for name in (options.metrics or "").split(",") if name.strip()]
    networks = [load_network(spec, world.device) for spec in options.network or [PACKAGED]]
    if len({network.identity + network.title for network in networks}) < len(networks):
        raise UserError("a --network is given twice; drop one")
    metrics = [check_metrics(asked, network) for network in networks]
    work = _of_run if is_run else _of_images
    return work(options, place, out, networks, metrics, bool(asked), given, world)


@contextmanager
def _alone(out: Path, world: "World") -> Iterator[None]:
    """One command at a time writes there: the one that ends first would remove the other's features."""
    from dit_fast.evaluation.evaluate import FOLDER
    from dit_fast.files import locked
    from dit_fast.sampling.output import writing

    path = out / FOLDER / LOCK
    with writing(out):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        try:
            held = locked(path, world.rank)
        except BlockingIOError:
            raise UserError(
                f"{out}: another `dit-fast evaluate` writes there; wait for it, or name another folder with --out"
            ) from None
    with held:
        yield


def _of_run(
    options: argparse.Namespace, place: Path, out: Path, networks: "list[Network]", metrics: list[tuple[str, ...]],
    asked: bool, given: dict[str, Any], world: "World",
) -> int:  # fmt: skip
    from dit_fast.checkpoint.run import load_run
    from dit_fast.evaluation.evaluate import of_run
    from dit_fast.sampling.images import decoder
    from dit_fast.sampling.options import SampleOptions
    from dit_fast.world import meet

    scales = sweep(given.pop("cfg_scale", None))
    usual: dict[str, Any] = {}
    if "per_class" not in given:
        usual = {"count": COUNT, "labels": "random" if networks[0].kind == "adm" else "balanced"}
    run = load_run(place, weights=given.get("weights", "ema"))
    dataset = run.dataset(options.data)
    chosen = [SampleOptions(**{**usual, **given, "cfg_scale": scale}).resolved(run, dataset) for scale in scales]
    autoencoder = decoder(run, chosen[0], dataset)
    with _alone(out, world):
        meet()  # rank 0 will remove the parts, and a rank that comes after that would make its share again
        evaluators = _prepare(options, dataset, out, networks, metrics, asked, world)
        found: list[Evaluation] = []
        for each in chosen:
            label = "drawing" if len(chosen) == 1 else f"guidance {each.cfg_scale:g}"
            with _bar(each.total, label, world) as step:
                measured = of_run(evaluators, run, each, dataset, autoencoder, step)
            _record(out, measured, brief=len(chosen) > 1)
            found += measured
        if not world.rank:
            if len(chosen) > 1:
                _tell_best(found, len(networks))
            for evaluator in evaluators:
                for each in chosen:
                    evaluator.parts_of(run, each, dataset, autoencoder).remove()
    return 0


def _of_images(
    options: argparse.Namespace, place: Path, out: Path, networks: "list[Network]", metrics: list[tuple[str, ...]],
    asked: bool, given: dict[str, Any], world: "World",
) -> int:  # fmt: skip
    from dit_fast.evaluation.sources import open_images
    from dit_fast.world import meet

    images = open_images(place)
    if options.reference is None:
        raise UserError(f"{place}: images from files have no data set to be compared with; name one with --reference")
    with _alone(out, world):
        meet()
        evaluators = _prepare(options, None, out, networks, metrics, asked, world)
        for evaluator in evaluators:
            with _bar(images.count, "images", world) as step:
                evaluation = evaluator.of_images(images, step=step)
            if evaluation is not None:
                _record(out, [evaluation], brief=False)
                evaluator.parts_of_images(images).remove()
    return 0


def _prepare(
    options: argparse.Namespace, dataset: Any, out: Path, networks: "list[Network]", metrics: list[tuple[str, ...]],
    asked: bool, world: "World",
) -> "list[Evaluator]":  # fmt: skip
    from dit_fast.evaluation.evaluate import FOLDER, open_reference, prepared

    evaluators = []
    for network, wanted in zip(networks, metrics, strict=True):
        source = open_reference(options.reference, dataset, network, out / FOLDER, options.reference_count, world)
        total = source.parts.total if source.parts else 0
        with _bar(total, "reference", world) as step:
            evaluator, left = prepared(source, network, wanted, asked, out / FOLDER, world, step)
        for line in left:
            logger.warning(line)
        evaluators.append(evaluator)
    return evaluators


def sweep(text: str | None) -> list[float | None]:
    """The scales that --cfg-scale names: one, or FIRST:LAST:STEP with both ends, exact in decimals."""
    if text is None:
        return [None]
    try:
        numbers = [Decimal(part) for part in text.split(":")]
        first, last, step = numbers if len(numbers) == 3 else (numbers[0], numbers[0], Decimal(1))
        if len(numbers) not in (1, 3) or not all(number.is_finite() for number in numbers):
            raise ValueError
    except (InvalidOperation, ValueError):
        raise UserError(f"--cfg-scale {text}: expected a number or FIRST:LAST:STEP, e.g. 1:3:0.1") from None
    if step <= 0 or last < first or (last - first) / step >= MOST_SCALES:
        raise UserError(
            f"--cfg-scale {text}: FIRST:LAST:STEP must ascend, in at most {MOST_SCALES} steps, e.g. 1:3:0.1"
        )
    return [float(first + number * step) for number in range(int((last - first) / step) + 1)]


@contextmanager
def _bar(total: int, what: str, world: "World") -> "Iterator[Step]":
    from tqdm import tqdm

    share = total if world.size == 1 else -(-total // world.size)
    with tqdm(total=share, desc=what, unit="image", disable=True if world.rank or not total else None) as bar:
        yield lambda images: bar.update(min(images, share - bar.n))


def _record(out: Path, evaluations: "list[Evaluation]", brief: bool) -> None:
    from dit_fast.evaluation.records import append_evaluation
    from dit_fast.sampling.output import writing

    for each in evaluations:
        with writing(out):
            append_evaluation(out, each)
        print(_values(each, with_scale=brief))
        if not brief:
            print(f"  {each.protocol.text()}")


def _values(evaluation: "Evaluation", with_scale: bool) -> str:
    at = [f"guidance {evaluation.protocol.guidance:g}"] if with_scale else []
    at += [f"step {evaluation.step}"] if evaluation.step is not None else []
    return "  ".join([*at, *(f"{name} {value:.6g}" for name, value in evaluation.values.items())])


def _tell_best(found: "list[Evaluation]", networks: int) -> None:
    """The best of a sweep by the first metric of each network."""
    from dit_fast.evaluation.records import best

    for number in range(networks):
        own = found[number::networks]
        metric = next(iter(own[0].values))
        top = best(own, metric)
        edge = " (an end of the sweep: widen it)" * (top in (own[0], own[-1]))
        print(f"best {metric} {top.values[metric]:.6g} at guidance {top.protocol.guidance:g}{edge}")
        print(f"  {top.protocol.text()}")


def _reach(out: Path, text: str) -> int:
    from dit_fast.evaluation.records import FILE_NAME, curve, read_evaluations, steps_to_reach

    metric, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        raise UserError(f"--reach {text}: expected METRIC=VALUE, e.g. FID=20") from None
    rows = read_evaluations(out)
    protocols = list(dict.fromkeys(each.protocol for each in rows if metric in each.values and each.step is not None))
    if not protocols:
        known = ", ".join(dict.fromkeys(name for each in rows for name in each.values)) or "nothing"
        raise UserError(f"{out / FILE_NAME}: holds no {metric} ({known} was measured); evaluate steps of the run first")
    for protocol in protocols:
        points = curve(rows, metric, protocol)
        step = steps_to_reach(points, metric, value)
        where = f"not by step {points[-1][0]}" if step is None else f"at step {step:.0f}"
        first = " (the first that was measured)" * (step == points[0][0])
        print(f"{metric} {value:g}: {where}{first}, of {len(points)} measured\n  {protocol.text()}")
    return 0
