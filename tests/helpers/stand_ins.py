"""Packages that only GPU machines have, as they are called: what they refuse is refused, every call is written down.

flash-attn 2 (`flash_attn_func`) and NVIDIA apex (`FusedAdam`) by their documented signatures; numbers are plain torch.
"""

import math
import types
from typing import ClassVar

import torch


def flash_attn():
    """A module `flash_attn`; `calls` of it: the shape of the queries and the scale of each call."""
    module = types.ModuleType("flash_attn")
    module.calls = []

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        for name, x in (("q", q), ("k", k), ("v", v)):
            assert x.dim() == 4, f"{name} must be [batch, tokens, heads, width], not {list(x.shape)}"
            assert x.dtype in (torch.float16, torch.bfloat16), f"{name} is {x.dtype}"
            assert (x.dtype, x.device) == (q.dtype, q.device), f"{name} is not as q"
            assert x.stride(-1) == 1, f"{name}: the last dimension must be contiguous, strides are {x.stride()}"
            assert x.shape[-1] in range(8, 257, 8), f"{name}: heads of width {x.shape[-1]}"
        assert q.shape == k.shape == v.shape
        unused = (dropout_p, causal, softcap, alibi_slopes, return_attn_probs)
        assert not any(unused), f"not our attention: {unused}"
        scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
        module.calls.append((tuple(q.shape), scale))
        scores = torch.einsum("nthd,nshd->nhts", q.float() * scale, k.float())
        return torch.einsum("nhts,nshd->nthd", scores.softmax(-1), v.float()).to(q.dtype).contiguous()

    module.flash_attn_func = flash_attn_func
    return module


def apex():
    """Modules `amp_C`, `apex` and `apex.optimizers`, by name; `FusedAdam.calls`: the step counter of each update."""

    class FusedAdam(torch.optim.Optimizer):
        calls: ClassVar = []

        def __init__(
            self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
            weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False, master_weights=False,
        ):  # fmt: skip
            assert (adam_w_mode, bias_correction, amsgrad) == (True, True, False)
            super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

        def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
            assert not any((closure, grads, output_params, scale, grad_norms, grad_scaler))
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                assert type(group["step"]) is int, "the counter goes to a C++ function as an int"
                self.calls.append(group["step"])
                for p in (p for p in group["params"] if p.grad is not None):
                    state = self.state[p]
                    if not state:
                        state |= {"exp_avg": torch.zeros_like(p).float(), "exp_avg_sq": torch.zeros_like(p).float()}
                    assert p.stride() == p.grad.stride(), "both are walked through as they lie"
                    assert p.dtype == p.grad.dtype
                    self._update(p.data, p.grad, state["exp_avg"], state["exp_avg_sq"], group)

        @staticmethod
        def _update(p, g, m, v, group):
            (beta1, beta2), count, lr = group["betas"], group["step"], group["lr"]
            assert m.dtype == v.dtype == torch.float32
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            update = (m / (1 - beta1**count)) / ((v / (1 - beta2**count)).sqrt() + group["eps"])
            p.sub_(lr * (update + group["weight_decay"] * p))

    package, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    package.__path__, package.optimizers, optimizers.FusedAdam = [], optimizers, FusedAdam
    return {"amp_C": types.ModuleType("amp_C"), "apex": package, "apex.optimizers": optimizers}
