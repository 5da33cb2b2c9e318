"""docs/drop-in.md: every block of Python runs, in order, on small models and tensors."""

import re
from pathlib import Path

import pytest
import torch

from dit_fast import ops
from tests.helpers.published_models import Transformer, inputs
from tests.patch.test_lightningdit import LightningDiT

PAGE = (Path(__file__).parents[2] / "docs" / "drop-in.md").read_text()


def test_the_blocks_of_the_page_run():
    pytest.importorskip("diffusers")
    from tests.patch.test_diffusers import _dit, _hunyuan

    torch.manual_seed(0)
    x, t, y = inputs()
    names = {"model": Transformer("sit"), "sit": Transformer("repa"), "diversedit": Transformer("output")}
    names["lightningdit"] = LightningDiT()
    names |= {"diffusers_dit": _dit(), "hunyuan": _hunyuan(), "x": x, "t": t, "y": y, "steps": torch.tensor([3, 700])}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 10
    for block in blocks:
        exec(compile(block, "docs/drop-in.md", "exec"), names)


def test_every_public_function_has_its_example():
    functions = [
        name for name in vars(ops) if not name.startswith("_") and type(getattr(ops, name)).__name__ == "function"
    ]
    assert not [name for name in functions if f"ops.{name}(" not in PAGE]
