"""`dit-fast shards build | add-features | add-field | index | verify | import-vae-sd | info`."""

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_fast.data.address import is_remote
from dit_fast.errors import ConfigError, DataError

ABSENT = argparse.SUPPRESS  # the function's own default holds, and none is shown
ENCODERS = (
    "efficientnet-lite0, efficientnet-lite0:32, or (dinov2|dino|mae|mocov3|clip|ijepa)-vit-(s|b|l|h|g)[-reg]:PATH"
)


def add_commands(subparsers: Any) -> None:
    """Adds `shards` and its commands, and `import`; each sets `run`, a function of the parsed options."""
    shards = subparsers.add_parser(
        "shards",
        help="build, check and describe latent shards",
        epilog="example: dit-fast shards build photos/ shards/ --autoencoder diffusers:sd-vae/ --size 256",
    )
    commands = shards.add_subparsers(dest="shards_command", required=True, metavar="COMMAND")
    build = _command(
        commands, "build", _build, "encode an image folder or an .npz into latent shards; run again to continue"
    )
    build.add_argument("source", help="folder with one folder of images per class, or .npz with images and labels")
    build.add_argument("out", help="folder for the shards")
    forms = "pca (fitted on the source), pca:FILE, diffusers:DIR, taef2:DIR or features:ENCODER (see --patch)"
    build.add_argument("--autoencoder", required=True, default=ABSENT, help=forms)
    build.add_argument("--size", type=int, required=True, default=ABSENT, help="pixels of the square centre crop")
    _add_common(build)
    build.add_argument("--store-images", action="store_true", help="also keep the cropped images as PNG")
    build.add_argument(
        "--encoder",
        default=ABSENT,
        help=f"also store features of this encoder: {ENCODERS}",
    )
    build.add_argument(
        "--token-grid", type=int, default=ABSENT, help="feature tokens a side (default: half the latent size)"
    )
    build.add_argument("--class-token", action="store_true", help="also store the encoder's class token")
    build.add_argument("--patch", type=int, default=4, help="pca, features: pixels per latent a side")
    build.add_argument("--channels", type=int, default=12, help="pca: latent channels")
    build.add_argument("--batch-size", type=int, default=32, help="images encoded together")
    build.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the autoencoder runs")
    build.add_argument(
        "--no-shuffle", dest="shuffle", action="store_false", default=ABSENT, help="keep the source's order"
    )
    build.add_argument(
        "--no-exif",
        dest="exif",
        action="store_false",
        default=ABSENT,
        help="leave photographs as stored, like ADM's script, instead of turning them as their orientation tag says",
    )
    tree = _command(commands, "import-vae-sd", _import, "import the vae-sd npy tree of the published REPA-family code")
    tree.add_argument("source", help="the vae-sd folder, with its own dataset.json")
    tree.add_argument("out", help="folder for the shards")
    _add_common(tree)
    tree.add_argument(
        "--num-classes",
        type=int,
        default=ABSENT,
        help="number of classes (default: largest label + 1, and each must have an image)",
    )
    tree.add_argument("--scale", type=float, default=0.18215, help="model-space latents are z * scale + shift")
    tree.add_argument("--shift", type=float, default=0.0, help="see --scale")
    tree.add_argument("--autoencoder", default=ABSENT, help="where its decoder lies, e.g. diffusers:DIR")
    features = _command(
        commands,
        "add-features",
        _add_features,
        "add what an encoder gives of the images to finished shards, in tars of its own; run again to continue",
    )
    features.add_argument("shards", help="folder of the data set")
    features.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        default=["features"],
        help="features, class_token, one of them with _ and a word behind (features_clip), or image; all in one pass",
    )
    features.add_argument("--encoder", default=ABSENT, help=f"{ENCODERS}; not needed for `image`")
    features.add_argument(
        "--images",
        default=ABSENT,
        help="where the shards store no images: their source, or an imported tree's folder with images/ and vae-sd/",
    )
    features.add_argument("--token-grid", type=int, default=ABSENT, help="tokens a side (default: half the latents)")
    features.add_argument("--batch-size", type=int, default=32, help="images encoded together")
    features.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the stored values")
    features.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the encoder runs")
    _add_processes(features)
    add = _command(
        commands, "add-field", _add, "add a field to finished shards, in tars of its own; run again to continue"
    )
    add.add_argument("shards", help="folder of the data set")
    add.add_argument("names", nargs="+", metavar="NAME", help="the field; an encoder may give several at once")
    made = add.add_mutually_exclusive_group(required=True)
    made.add_argument("--array", default=ABSENT, help=".npy [num_samples, ...], one row per sample in key order")
    made.add_argument("--encoder", default=ABSENT, help="as add-features, on the CPU")
    add.add_argument("--images", default=ABSENT, help="encoder: the source of the shards, where they store no images")
    add.add_argument(
        "--token-grid", type=int, default=ABSENT, help="encoder: tokens a side (default: half the latents)"
    )
    add.add_argument("--batch-size", type=int, default=ABSENT, help="encoder: images encoded together (default: 32)")
    add.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default=ABSENT,
        help="of stored floats (default: the array's, float16)",
    )
    _add_processes(add)
    for name, run, text in (
        ("index", _index, "rebuild the .idx files from the tars"),
        ("verify", _verify, "check every byte against dataset.json"),
        ("info", _info, "describe a data set"),
    ):
        _command(commands, name, run, text).add_argument(
            "path", help="folder (info: or http(s) address) of the data set"
        )
    text = "turn latents of others into shards: LightningDiT's safetensors, Arrow, Parquet, WebDataset tars, vae-sd"
    foreign = _command(subparsers, "import", _import_latents, text)
    foreign.epilog = "example: dit-fast import imagenet-latents shards --scale 0.18215 --autoencoder diffusers:sd-vae"
    foreign.add_argument("source", help="folder of the files; docs/data.md")
    foreign.add_argument("out", help="folder for the shards")
    foreign.add_argument("--latents", default=ABSENT, help="column or member of the latents (default: the usual name)")
    foreign.add_argument("--labels", default=ABSENT, help="column or member of the labels (default: the usual name)")
    foreign.add_argument(
        "--form", choices=("mean", "mean-std", "mean-logvar"), default=ABSENT,
        help="of a latent: [C, h, h] (default), or both moments, [2 C, h, h]",
    )  # fmt: skip
    foreign.add_argument("--scale", type=float, default=ABSENT, help="model-space latents are z * scale + shift")
    foreign.add_argument("--shift", type=float, default=ABSENT, help="see --scale")
    foreign.add_argument("--scaled", action="store_true", default=ABSENT, help="what lies there is in model space")
    foreign.add_argument(
        "--num-classes", type=int, default=ABSENT, help="number of classes (default: as the labels say)"
    )
    foreign.add_argument("--autoencoder", default=ABSENT, help="where the decoder lies, e.g. diffusers:DIR")
    _add_common(foreign)


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples-per-shard", type=int, default=2048, help="samples in each tar")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the stored moments")
    _add_processes(parser)


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, default=1, help="worker processes; the result does not depend on it")
    parser.add_argument("--no-progress", dest="progress", action="store_false", default=ABSENT, help="no progress bar")


def _arguments(options: argparse.Namespace, function: Callable[..., Any]) -> dict[str, Any]:
    """The options that are the function's; others belong to the command line as a whole."""
    mine = inspect.signature(function).parameters.keys() - {"source", "src", "out"}
    return {key: value for key, value in vars(options).items() if key in mine}


def _build(options: argparse.Namespace) -> int:
    from dit_fast.preparation.build import build_shards

    print(describe(build_shards(options.source, options.out, **_arguments(options, build_shards))))
    return 0


def _add(options: argparse.Namespace) -> int:
    from dit_fast.data.added import add_field
    from dit_fast.preparation.fields import add_encoded

    function = add_field if "array" in options else add_encoded
    given = _arguments(options, function)
    others = {"images", "token_grid", "batch_size"} & vars(options).keys() - given.keys()
    if others:
        raise ConfigError(f"--{min(others).replace('_', '-')} belongs to --encoder; leave it out with --array")
    if "array" in options:
        if len(options.names) > 1:
            raise ConfigError(f"--array gives one field, not {', '.join(options.names)}; add them one by one")
        given["name"] = options.names[0]
    print(describe(function(**given)))
    return 0


def _add_features(options: argparse.Namespace) -> int:
    from dit_fast.preparation.fields import add_encoded

    print(describe(add_encoded(**_arguments(options, add_encoded))))
    return 0


def _import(options: argparse.Namespace) -> int:
    from dit_fast.preparation.vae_sd import import_vae_sd

    print(describe(import_vae_sd(options.source, options.out, **_arguments(options, import_vae_sd))))
    return 0


def _import_latents(options: argparse.Namespace) -> int:
    from dit_fast.preparation.import_latents import import_latents
    from dit_fast.preparation.vae_sd import import_vae_sd

    tree = (Path(options.source) / "dataset.json").exists() and not any(Path(options.source).glob("*.tar"))
    function: Callable[..., Any] = import_vae_sd if tree else import_latents
    given = _arguments(options, function)
    asked = {"latents", "labels", "form", "scale", "shift", "scaled", "num_classes", "autoencoder"} & vars(
        options
    ).keys()
    if others := asked - given.keys():
        raise ConfigError(
            f"--{min(others).replace('_', '-')} is not for a vae-sd tree, which {options.source} is; drop it"
        )
    print(describe(function(options.source, options.out, **given)))
    return 0


def _index(options: argparse.Namespace) -> int:
    from dit_fast.data.dataset import read_description
    from dit_fast.preparation.verify import rebuild_index

    root, info = read_description(options.path)
    if is_remote(root):
        raise DataError(f"{root}: only local data sets are indexed; download it first")
    problems: list[str] = []
    for name in (shard.name for family in info.families for shard in family.shards):
        try:  # a damaged one does not keep the others from their index
            print(f"{root}/{name}: {len(rebuild_index(Path(root) / name))} samples", flush=True)
        except DataError as error:
            problems.append(str(error))
            print(error, flush=True)
    if problems:
        more = f" (the first of {len(problems)} shards without an index)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from dit_fast.preparation.verify import verify_dataset

    dataset = verify_dataset(
        options.path, lambda name: print(f"{name}: ok", flush=True), lambda line: print(line, flush=True)
    )
    print(f"{options.path}: {len(dataset)} samples, all bytes as dataset.json says")
    return 0


def _info(options: argparse.Namespace) -> int:
    from dit_fast.data.dataset import open_dataset

    print(describe(open_dataset(options.path)))
    return 0


def describe(dataset: Any) -> str:
    """A few lines about an opened data set."""
    info = dataset.info
    size = sum(shard.bytes for family in info.families for shard in family.shards) / 2**20
    lines = [
        f"{dataset.root}: {info.num_samples} samples, {info.num_classes} classes",
        f"shards       {len(info.shards)} ({size:.1f} MiB)",
        f"latents      [{info.channels}, {info.size}, {info.size}] {info.dtype}, mean{' and std' if info.std else ''}",
        f"autoencoder  {info.autoencoder or 'place unknown'} ({info.autoencoder_identity})",
    ]
    for name, field in info.fields.items():
        own = f", in {len(field.shards)} shards of its own" if field.shards else ""
        lines.append(
            f"field        {name} {list(field.shape)} {field.dtype}{field.source and f' ({field.source})'}{own}"
        )
    return "\n".join([*lines, f"fingerprint  {info.fingerprint}"])
