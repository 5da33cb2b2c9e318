"""REPA: the loss, the projector it adds, and its complaints."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit_fast.checkpoint import export_official, load_official
from dit_fast.data.field import Field
from dit_fast.errors import ConfigError
from dit_fast.methods import build_methods
from dit_fast.methods.reg import REG
from dit_fast.methods.repa import REPA, repa_loss
from dit_fast.models import build_model
from tests.helpers.golden import assert_close


def small(**changes):
    sizes = {"input_size": 8, "hidden_size": 32, "depth": 4, "num_heads": 2, "num_classes": 5, **changes}
    return build_model("SiT-Nano/2", **sizes)


def shards(feature_shape=(16, 12)):
    return SimpleNamespace(field=lambda name: Field(f"{name}.npy", feature_shape, "float16"))


def test_loss_is_minus_the_mean_cosine():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(3, 5, 7, generator=generator) for _ in range(2))
    assert_close(repa_loss(p, q), -torch.nn.functional.cosine_similarity(p, q, dim=-1).mean(), 1e-6)
    assert_close(repa_loss(3 * p, 0.1 * p), torch.tensor(-1.0), 1e-6)


def test_loss_upcasts_and_gives_the_target_no_gradient():
    p, q = torch.randn(2, 3, 4).bfloat16().requires_grad_(), torch.randn(2, 3, 4).requires_grad_()
    loss = repa_loss(p, q)
    loss.backward()
    assert loss.dtype == torch.float32
    assert p.grad.dtype == torch.bfloat16
    assert q.grad is None
    assert torch.isfinite(repa_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)))


def test_projector_has_the_official_names_and_place():
    model = small()
    REPA(REPA.Config(encoder_depth=2, projector_width=24), model, shards())
    names = [name for name, _ in model.named_parameters() if name.startswith("projectors.")]
    assert names == [f"projectors.0.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    assert [tuple(model.get_parameter(name).shape) for name in names] == [
        (24, 32),
        (24,),
        (24, 24),
        (24,),
        (12, 24),
        (12,),
    ]
    order = list(dict(model.named_children()))
    assert order.index("blocks") < order.index("projectors") < order.index("final_layer")


def test_term_aligns_the_block_counted_from_one():
    model = small()
    (method,) = build_methods([REPA.Config(encoder_depth=3, projector_width=24, weight=0.7)], model, shards())
    assert method.blocks == {2}
    assert method.fields == ("features",)
    feature, target = torch.randn(2, 16, 32), torch.randn(2, 16, 12)
    context = SimpleNamespace(features={2: feature}, batch={"features": target})
    term = method.terms(context)["repa/alignment"]
    assert_close(term.value, repa_loss(model.projectors[0](feature), target), 1e-6)
    assert term.weight == 0.7


def test_repa_beside_reg_aligns_the_patch_tokens_with_a_projector_of_its_own():
    """Projectors stand in the order of the methods, under the names that the published code gives several encoders."""
    fields = {"features": Field("features.npy", (16, 12), "float16"), "class_token": Field("t.npy", (12,), "float32")}
    data: Any = SimpleNamespace(field=fields.__getitem__)
    configs = [REG.Config(encoder_depth=2, projector_width=8), REPA.Config(encoder_depth=3, projector_width=4)]
    for order in (configs, configs[::-1]):
        model = small(class_token=12)
        methods = {method.name: method for method in build_methods(order, model, data)}
        assert list(model.projectors) == [*methods[order[0].name].heads, *methods[order[1].name].heads]
        again = load_official(export_official(model), "reg", num_heads=2)
        assert [len(head[0].bias) for head in again.projectors] == [config.projector_width for config in order]
    feature, target = torch.randn(2, 17, 32), torch.randn(2, 16, 12)
    context: Any = SimpleNamespace(features={2: feature}, batch={"features": target})
    term = methods["repa"].terms(context)["repa/alignment"]
    assert_close(term.value, repa_loss(model.projectors[0](feature[:, 1:]), target), 1e-6)


def test_token_grids_that_differ_are_named():
    with pytest.raises(ConfigError, match=r"49 feature tokens.*16 tokens"):
        REPA(REPA.Config(encoder_depth=4), small(), shards((49, 12)))


def test_target_grid_is_the_models_token_grid():
    """methods.md §7.5, item 19: 256 tokens at 256 px, 1024 at 512 px."""
    for size, tokens in ((32, 256), (64, 1024)):
        with torch.device("meta"):
            REPA(REPA.Config(encoder_depth=4), small(input_size=size), shards((tokens, 768)))
