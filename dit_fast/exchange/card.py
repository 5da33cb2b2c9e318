"""The README.md of an exported folder, in the form that model hubs read."""

from pathlib import Path
from typing import Any

from dit_fast import __version__
from dit_fast.checkpoint.run import LoadedRun
from dit_fast.evaluation.records import read_evaluations
from dit_fast.options import to_dict
from dit_fast.sampling.options import SampleOptions

LOADING = {
    "DiTPipeline": """from diffusers import DiTPipeline

pipe = DiTPipeline.from_pretrained(FOLDER, trust_remote_code=True)  # transformer/modeling_dit.py: diffusers' own DiT
images = pipe([207, 360], guidance_scale=1.5, num_inference_steps=250).images  # has other time frequencies""",
    "DitFastPipeline": """from diffusers import DiffusionPipeline  # and pip install 'dit_fast[train,diffusers]'

pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)  # runs pipeline.py
images = pipe([0, 1, 2], seed=0).images""",
}

LAST = {
    "DiTPipeline": "DDIM steps start at 0, as in diffusers' own folders; those of the published sampler end at 999.",
    "DitFastPipeline": "Every setting of the training run: `run` in `transformer/config.json`.",
}


def model_card(run: LoadedRun, folder: Path, pipeline: str, reasons: list[str], options: SampleOptions) -> str:
    """Markdown with a YAML head. folder: of the run, for what was measured of it. options: resolved."""
    config, methods = to_dict(run.config), list(to_dict(run.config)["methods"])
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in run.model.shapes.items())
    optimizer, engine = config["optimizer"], config["engine"]
    why = f" (not diffusers' DiTPipeline: {'; '.join(reasons)})" if reasons else ""
    lines = [
        "---",
        "library_name: diffusers",
        "tags: [diffusion-transformer, class-conditional-image-generation, dit_fast"
        + "".join(f", {method}" for method in methods) + "]",
        "---",
        "",
        f"# {run.config.model.name}, {' + '.join(methods) or run.config.objective.name}",
        "",
        "```python",
        LOADING[pipeline],
        "```",
        "",
        "| | |",
        "| --- | --- |",
        f"| model | `{run.config.model.name}`, denoises {shapes} |",
        f"| objective | `{run.config.objective.name}` |",
        f"| methods | {', '.join(f'`{method}`' for method in methods) or 'none'} |",
        f"| weights | {options.weights}, step {run.step} |",
        f"| batch, learning rate, EMA | {engine['global_batch']}, {optimizer['lr']}, {optimizer['ema_decay']} |",
        f"| pipeline | `{pipeline}`{why} |",
        f"| sampled by default | {options.text()} |",
        f"| made by | dit_fast {__version__} |",
        "",
        *_measured(folder, run.step),
        LAST[pipeline],
    ]  # fmt: skip
    return "\n".join([*lines, ""])


def _measured(folder: Path, step: int) -> list[str]:
    """A table of what was measured at this step: no number without its protocol."""
    found: list[Any] = [each for each in read_evaluations(folder) if each.step == step]
    if not found:
        return ["No metric of these weights was measured.", ""]
    rows = [
        f"| {', '.join(f'{name} {value:.4g}' for name, value in each.values.items())} | {each.protocol.text()} |"
        for each in found
    ]
    return ["| measured | by |", "| --- | --- |", *rows, ""]
