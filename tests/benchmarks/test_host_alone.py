import torch

from dit_fast.benchmarks.host_alone import seconds


def test_the_calls_are_made_once_a_round_and_no_gradient_stays():
    made, model = [], torch.nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    calls = [(lambda x, by: made.append(x + by), (k,), {"by": 1}) for k in range(2)]
    found = seconds(calls, model, rounds=3)
    assert made == [1, 2] * 3
    assert set(found) == {"operators", "accumulation"}
    assert found["accumulation"] > 0
    assert model.weight.grad is None
