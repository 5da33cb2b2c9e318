"""REPA's cosine on every device at hand."""

import pytest
import torch

from dit_fast import ops
from tests.helpers.cases import loop_over
from tests.helpers.devices import STREAM, TOLERANCE, check_no_wait, check_values_and_gradients, several

CASE = (several(ops.repa_cosine), [STREAM, STREAM])


@loop_over("dtype", list(TOLERANCE))
def test_values_and_gradients(dtype, device):
    check_values_and_gradients(*CASE, dtype, device)


def test_no_wait_for_the_device(device):
    check_no_wait(*CASE, device)


def test_streams_and_repeated_launches_do_not_share_a_ticket(device):
    """Many launches that may overlap: each gives the bits of the one that ran alone."""
    if device.type != "cuda":
        pytest.skip("only CUDA has streams")
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(8, 257, 768, generator=generator).to(device) for _ in range(2))
    alone = ops.repa_cosine(p, q)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    values = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                values.append(ops.repa_cosine(p, q))
    torch.cuda.synchronize()
    assert all(torch.equal(value, alone) for value in values)


def test_a_captured_graph_gives_the_same_bits(device):
    if device.type != "cuda":
        pytest.skip("only CUDA has graphs")
    p, q = (torch.randn(4, 100, 768, device=device) for _ in range(2))
    alone = ops.repa_cosine(p, q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = ops.repa_cosine(p, q)
    for _ in range(3):
        graph.replay()
        assert torch.equal(value, alone)
