import pytest
import torch

from dit_fast.checkpoint import official_parameter_order, optimizer_state_by_name
from dit_fast.errors import CheckpointError
from tests.helpers.deterministic_fill import tiny_model


def _trained(wiring):
    """A model and the state of an optimizer that numbers all its parameters, as the published trainers do."""
    model = tiny_model(wiring).float()
    parameters = dict(model.named_parameters())
    family = "repa" if wiring == "off" else "diversedit"
    order = official_parameter_order(model, family)
    optimizer = torch.optim.AdamW([parameters[name] for name in order], lr=1e-3, weight_decay=0)
    v, features = model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2]), taps=[1])
    (v.square().mean() + model.projectors[0](features[1]).square().mean()).backward()
    optimizer.step()
    return model, family, order, optimizer


@pytest.mark.parametrize("wiring", ["off", "input"])
def test_state_is_found_by_name(wiring):
    model, family, order, optimizer = _trained(wiring)
    named = optimizer_state_by_name(optimizer.state_dict(), model, family)
    parameters = dict(model.named_parameters())
    assert "pos_embed" not in named
    assert set(named) == set(order) - {"pos_embed"}
    for name, entry in named.items():
        assert set(entry) == {"step", "exp_avg", "exp_avg_sq"}
        assert torch.equal(entry["exp_avg"], optimizer.state[parameters[name]]["exp_avg"])


def test_states_of_another_family_are_refused():
    model, _, _, optimizer = _trained("off")
    fused = tiny_model("input")
    with pytest.raises(CheckpointError, match="numbers 58 parameters"):
        optimizer_state_by_name(optimizer.state_dict(), fused, "diversedit")
    state = optimizer.state_dict()
    state["state"][3]["exp_avg"] = torch.zeros(5, 5)
    with pytest.raises(CheckpointError, match=r"state 3 'exp_avg'.*t_embedder\.mlp\.0\.weight"):
        optimizer_state_by_name(state, model, "repa")
