"""LayerNorms of other libraries, where they are installed: what a user would put before the linear map instead of ours.

NVIDIA apex is known by its modules; the distribution of that name on PyPI is something else.
"""

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

LayerNorm = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # (x, weight, bias, eps)


def _liger() -> LayerNorm:
    return importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction.apply


def _apex() -> LayerNorm:
    fused = importlib.import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    return lambda x, weight, bias, eps: fused(x, weight, bias, tuple(weight.shape), eps)


def _flash_attn() -> LayerNorm:
    fused = importlib.import_module("flash_attn.ops.triton.layer_norm").layer_norm_fn
    return lambda x, weight, bias, eps: fused(x, weight, bias, eps=eps)


def _transformer_engine() -> LayerNorm:
    library = importlib.import_module("transformer_engine.pytorch")

    def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        module = library.LayerNorm(weight.shape[0], eps=eps, device="meta")
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))

    return norm


_LIBRARIES: dict[str, tuple[tuple[str, ...], Callable[[], LayerNorm]]] = {
    "Liger": (("liger_kernel",), _liger),
    "apex": (("apex", "fused_layer_norm_cuda"), _apex),
    "flash-attn": (("flash_attn",), _flash_attn),
    "TransformerEngine": (("transformer_engine",), _transformer_engine),
}
NAMES = tuple(_LIBRARIES)


def layer_norms() -> dict[str, LayerNorm]:
    """By library, those that are installed. One that is there but does not load fails when it is first called."""
    found = {}
    for name, (modules, load) in _LIBRARIES.items():
        if all(importlib.util.find_spec(module) for module in modules):
            found[name] = _when_called(load)
    return found


def _when_called(load: Callable[[], LayerNorm]) -> LayerNorm:
    def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        try:
            return load()(x, weight, bias, eps)
        except (ImportError, AttributeError, TypeError) as error:
            raise RuntimeError(str(error)) from error  # so that the harness leaves the side out, with the reason

    return norm
