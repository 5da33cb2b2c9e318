"""The network N1 of the golden numbers `transport_*` and `xpred_*`: a plain callable in float64."""

import torch

from tests.helpers.golden import Golden


def weights(reference: Golden) -> dict[str, torch.Tensor]:
    """W0 [H, C], W1 [C, H], u [H], E [K + 1, H] of float64, which take gradients."""
    return {key: value.double().requires_grad_() for key, value in reference.group("state/").items()}


def network(weights: dict[str, torch.Tensor], skip: float):
    """f(x, t, y) = skip x + W1 tanh(W0 x + (1 - t) u + E[y]) with t in our direction (0 data, 1 noise)."""

    def f(x, t, y):
        shift = (1 - t)[:, None] * weights["u"] + weights["E"][y]
        inner = torch.einsum("hc,ncij->nhij", weights["W0"], x) + shift[:, :, None, None]
        return skip * x + torch.einsum("ch,nhij->ncij", weights["W1"], inner.tanh())

    return f
