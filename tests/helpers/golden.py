"""Numbers produced by the official implementations: how tests read and compare them.

A compact choice lies in `tests/data`; a folder named by the environment variable DIT_FAST_GOLDEN adds more files of the
same form. Each file is an `.npz` without pickles whose `meta` entry is a JSON string. The files share most weights: in
`tests/data` an entry that is a name stands for the equal one in the file of that name.
"""

import json
import os
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parents[1] / "data"


class Golden:
    """One golden file: `meta` (dict), arrays by name, and groups of arrays that share a prefix."""

    def __init__(self, path: Path):
        self.path = path
        self._archive = np.load(path, allow_pickle=False)

    @cached_property
    def meta(self) -> dict:
        return json.loads(str(self._archive["meta"]))

    @property
    def names(self) -> list[str]:
        return list(self._archive.files)

    def array(self, name: str) -> np.ndarray:
        value = self._archive[name]
        return golden(str(value)).array(name) if value.dtype.kind == "U" and name != "meta" else value

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(self.array(name)))

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors whose names start with `prefix`, in file order, the prefix taken off."""
        return {name[len(prefix) :]: self.tensor(name) for name in self.names if name.startswith(prefix)}


def _folders() -> list[Path]:
    extra = os.environ.get("DIT_FAST_GOLDEN")
    return [HERE, *([Path(extra)] if extra else [])]


def golden_names(*prefixes: str) -> list[str]:
    """Names (without `.npz`) of all golden files that start with one of the prefixes, each once."""
    found = {path.stem for folder in _folders() for path in folder.glob("*.npz") if path.stem.startswith(prefixes)}
    return sorted(found)


@cache
def golden(name: str) -> Golden:
    for folder in _folders():
        path = folder / f"{name}.npz"
        if path.exists():
            return Golden(path)
    raise FileNotFoundError(f"no golden file {name}.npz in {[str(folder) for folder in _folders()]}")


def assert_same_state(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """The same names in the same order, dtypes and bits."""
    assert list(left) == list(right)
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        assert torch.equal(left[key], right[key]), key


def assert_gradient_norms(model: torch.nn.Module, norms: dict[str, torch.Tensor], tol: float) -> None:
    """The norm of every gradient, 0 where there is none, is the published one to tol of it + 1e-7 of that of all."""
    whole = torch.stack(list(norms.values())).norm().item()
    for name, norm in norms.items():
        gradient = model.get_parameter(name).grad
        assert_close(torch.zeros(()) if gradient is None else gradient.norm(), norm, tol, 1e-7 * whole)


def assert_close(ours: torch.Tensor, reference, tol: float, extra: float = 0.0) -> None:
    """norm(ours - reference) <= tol * norm(reference) + extra, in float64 (the rule of the golden files)."""
    ours = torch.as_tensor(ours).detach().double().cpu()
    reference = torch.as_tensor(reference).double()
    assert ours.shape == reference.shape, f"shape {tuple(ours.shape)}, expected {tuple(reference.shape)}"
    error, bound = (ours - reference).norm().item(), tol * reference.norm().item() + extra
    assert error <= bound, f"error {error:.3e} above {bound:.3e}"
