"""Steps of foreign models on the CPU, unpatched and patched: `python -m dit_fast.benchmarks.patched [--write]`.

diffusers' DiT, and the published REPA and DiverseDiT modules as the tests have them (run it in a checkout), of
SiT-S/2's width with 4 blocks: forward, and backward from a squared output. One core, both sides in turn in one process,
glibc's allocator as it comes. With --write results/cpu/patched.json.
"""

import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_fast import patch
from dit_fast.benchmarks.results import RESULTS, environment, rounded, write
from dit_fast.benchmarks.timing import HostClock, interleave, summarise
from dit_fast.errors import UserError

WIDTH, HEADS, BLOCKS, BATCH, SIDE = 384, 6, 4, 8, 32
SAMPLES, SECONDS = 12, 8.0
CPU = torch.device("cpu")


def models() -> Iterator[tuple[str, nn.Module, Callable[[nn.Module], Tensor]]]:
    """Name, model and what makes a 0-d loss of it."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(BATCH, 4, SIDE, SIDE, generator=generator)
    times, labels = torch.rand(BATCH, generator=generator), torch.arange(BATCH)

    def published(model: nn.Module) -> Tensor:
        result = model(latents, times, labels)
        output = result["x"] if isinstance(result, dict) else result[0]
        return output.float().square().mean()

    transformer = importlib.import_module("tests.helpers.published_models").Transformer
    for name, kind, qk_norm in (
        ("REPA", "repa", False),
        ("REPA, QK-norm", "repa", True),
        ("DiverseDiT", "input", False),
    ):
        model = transformer(kind, WIDTH, BLOCKS, HEADS, qk_norm)
        model.pos_embed = nn.Parameter(0.1 * torch.randn(1, (SIDE // 2) ** 2, WIDTH), requires_grad=False)
        yield name, model, published
    diffusers = importlib.import_module("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=4, out_channels=4, num_layers=BLOCKS,
        sample_size=SIDE, num_embeds_ada_norm=1000,
    )  # fmt: skip

    def theirs(model: nn.Module) -> Tensor:
        result = model(latents, timestep=(1000 * times).long(), class_labels=labels).sample
        return result.float().square().mean()

    yield "diffusers DiT", model, theirs


def _step(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], precision: str, _: int, mark: Callable[[], None]
) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        value = loss(model)
    value.backward()
    model.zero_grad()
    mark()


def measure(seconds: float = SECONDS, samples: int = SAMPLES) -> dict[str, Any]:
    """By model and precision: median and quartiles of a step of each, and of the ratio within a round."""
    found: dict[str, Any] = {}
    for name, unpatched, loss in models():
        torch.manual_seed(0)
        for parameter in unpatched.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.03)
        patched = copy.deepcopy(unpatched)
        report = str(patch.apply(patched).report)
        for precision in ("fp32", "bf16"):
            calls = {
                side: partial(_step, model, loss, precision)
                for side, model in (("unpatched", unpatched), ("patched", patched))
            }
            rounds = interleave(calls, HostClock(), samples=samples, seconds=seconds, warm_up=1)
            times = {side: [each[0] for each in turns] for side, turns in rounds.items()}
            ratio = summarise([a / b for a, b in zip(times["unpatched"], times["patched"], strict=True)])
            found[f"{name}, {precision}"] = {
                "samples_s": times,
                "median_s": {side: summarise(each).median for side, each in times.items()},
                "paired_speedup": [ratio.lower_quartile, ratio.median, ratio.upper_quartile],
            }
        found[f"{name}, {precision}"]["report"] = report.splitlines()
    return {"schema": 1, "run": "patched", "batch": BATCH, "tokens": (SIDE // 2) ** 2, "width": WIDTH,
            "blocks": BLOCKS, "models": found}  # fmt: skip


def main() -> int:
    if sys.argv[1:] not in ([], ["--write"]):
        raise UserError("usage: python -m dit_fast.benchmarks.patched [--write]")
    torch.set_num_threads(1)
    result = measure()
    for name, found in result["models"].items():
        low, middle, high = found["paired_speedup"]
        milliseconds = "  ".join(f"{side} {1e3 * value:6.0f} ms" for side, value in found["median_s"].items())
        print(f"{name:22} {milliseconds}  {middle:.2f} ({low:.2f} to {high:.2f})")
    if sys.argv[1:]:
        write(RESULTS / "cpu" / "patched.json", rounded(result | environment(CPU)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
