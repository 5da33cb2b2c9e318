"""Numerics of the kernels under the interpreter; tests/ops/test_interpreter.py starts a process for them."""

import os

import pytest
import torch

# TRITON_INTERPRET counts when a kernel is defined, so it cannot be switched on inside a running test process.
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def approximate_division(monkeypatch):
    """Quotients come out two roundings too small, as a GPU's fast division may give them."""
    from triton.runtime.interpreter import InterpreterBuilder

    def divide(builder, *operands, exact=InterpreterBuilder.create_fdiv):
        quotient = exact(builder, *operands)
        quotient.data = quotient.data * quotient.data.dtype.type(1 - 2**-22)
        return quotient

    monkeypatch.setattr(InterpreterBuilder, "create_fdiv", divide)


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Every torch.empty is filled with NaN: what a kernel forgets to write cannot pass by luck."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
