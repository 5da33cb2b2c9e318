"""Launches of the diversity loss's formula; tests/ops/launches.py runs this."""

import torch

from dit_fast.kernels import diversity_terms

for blocks, width, release in ((12, 768, True), (24, 1024, True), (28, 1152, True), (28, 1152, False)):
    known = (torch.ones(3, blocks, width), *(torch.ones(blocks, blocks) for _ in range(2)), torch.ones(blocks))
    count = torch.ones(())
    *terms, gram, usage = diversity_terms.forward(*known, count, release)
    for grads in ((terms[0], None, None, None), tuple(terms)):
        diversity_terms.backward(*known, count, gram, usage, grads, release)
