"""A run as a folder that diffusers loads, with a model card."""

import json
import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dit_fast import autoencoders, files
from dit_fast.autoencoders import Autoencoder
from dit_fast.autoencoders.from_diffusers import DiffusersAutoencoder
from dit_fast.checkpoint.run import LoadedRun
from dit_fast.data import LatentDataset
from dit_fast.errors import UserError
from dit_fast.exchange import diffusers_dit
from dit_fast.exchange.card import model_card
from dit_fast.options import to_dict
from dit_fast.sampling.options import SampleOptions

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = "model_index.json"
DDIM = {  # DiT's noise schedule (arXiv 2212.09748), and steps from 0 on as diffusers' own DiT folders have them
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
}
NOT_STORED = ("seed", "index", "generator", "chunk")  # of a call, not of the model


def write_folder(run: LoadedRun, run_folder: Path, out: Path, dataset: LatentDataset, options: SampleOptions) -> str:
    """Writes `out` and returns the name of the pipeline in it: DiTPipeline, or DitFastPipeline for all that diffusers
    has no network for.

    options: how it is sampled by default. The folder appears whole or not at all. Raises UserError where diffusers is
    missing or `out` holds something already.
    """
    try:
        import diffusers
    except ImportError:
        raise UserError("a folder for diffusers needs diffusers; run `pip install 'dit_fast[diffusers]'`") from None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; name a new folder")
    decoder = run.autoencoder or autoencoders.of(dataset)
    vae = decoder.module if isinstance(decoder, DiffusersAutoencoder) else None
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    components: dict[str, Any] = {"_diffusers_version": diffusers.__version__}
    if vae is not None:
        vae.save_pretrained(str(partial / "vae"))
        components["vae"] = ["diffusers", type(vae).__name__]
    resolved = options.resolved(run, dataset)
    reasons = diffusers_dit.reasons_against(run, vae)
    if reasons:
        components |= _own(run, partial, dataset, decoder, vae, resolved)
    else:
        components |= _dit(run, partial, dataset)
    name = "DitFastPipeline" if reasons else "DiTPipeline"
    card = model_card(run, run_folder, name, reasons, resolved)
    files.replace(partial / "README.md", card.encode())
    _json(partial / INDEX, components)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return name


def header(run: LoadedRun) -> dict[str, str]:
    """What a weight file says about itself, in safetensors' metadata."""
    facts = {"step": run.step, "objective": run.config.objective.name, "model": run.config.model.name}
    facts["methods"] = ",".join(to_dict(run.config)["methods"]) or "none"
    return {"format": "pt", **{f"dit_fast.{name}": str(value) for name, value in facts.items()}}


def _dit(run: LoadedRun, folder: Path, dataset: LatentDataset) -> dict[str, Any]:
    model: Any = run.model
    settings = {"_class_name": "PublishedDiT", **diffusers_dit.settings(model)}
    _component(folder / "transformer", "modeling_dit", settings, diffusers_dit.state(model), header(run))
    (folder / "scheduler").mkdir()
    _json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", **DDIM})
    names = {str(label): name for label, name in enumerate(dataset.info.class_names or ())}
    return {
        "_class_name": "DiTPipeline",
        "transformer": ["modeling_dit", "PublishedDiT"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        **({"id2label": names} if names else {}),
    }


def _own(
    run: LoadedRun, folder: Path, dataset: LatentDataset, decoder: Autoencoder, vae: Any, options: SampleOptions
) -> dict[str, Any]:
    config = to_dict(run.config)
    config["data"]["path"] = config["run"]["dir"] = ""  # of the machine that it was trained on
    settings = {"_class_name": "DitFastTransformer", "run": config}
    state = {f"model.{name}": tensor.contiguous() for name, tensor in run.model.state_dict().items()}
    _component(folder / "transformer", "pipeline", settings, state, header(run))
    shutil.copyfile(folder / "transformer" / "pipeline.py", folder / "pipeline.py")
    scaled: Any = run.autoencoder or dataset.info
    arguments = {name: value for name, value in options.arguments().items() if name not in NOT_STORED}
    told = None if options.omega is None else {name: getattr(options, name) for name in ("omega", "t_min", "t_max")}
    return {
        "_class_name": ["pipeline", "DitFastPipeline"],
        "transformer": ["pipeline", "DitFastTransformer"],
        **({} if vae is not None else {"vae": [None, None], "autoencoder": _beside(folder, dataset)}),
        "scale": _plain(scaled.scale),
        "shift": _plain(scaled.shift),
        "sampling": {name: value for name, value in arguments.items() if value is not None},
        "told": told,
        "class_names": list(dataset.info.class_names or ()) or None,
    }


def _component(
    folder: Path, module: str, settings: Mapping[str, Any], state: Mapping[str, Tensor], about: dict[str, str]
) -> None:
    """Configuration, weights, and the file of this package that makes the module of them."""
    folder.mkdir()
    source = resources.files("dit_fast.exchange") / f"{module}.py"
    (folder / f"{module}.py").write_text(source.read_text())
    _json(folder / "config.json", settings)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS, metadata=about)


def _beside(folder: Path, dataset: LatentDataset) -> str:
    """Copies what decodes the data set's latents; the spec of the copy, its path within the folder."""
    kind, _, place = dataset.info.autoencoder.partition(":")
    source = Path(place)
    if source.is_dir():
        shutil.copytree(source, folder / "autoencoder")
        return f"{kind}:autoencoder"
    (folder / "autoencoder").mkdir()
    shutil.copyfile(source, folder / "autoencoder" / source.name)
    return f"{kind}:autoencoder/{source.name}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else float(value)


def _json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
