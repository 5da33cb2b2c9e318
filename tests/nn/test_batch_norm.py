"""The batch norm of latents and discriminators, in one process."""

import torch

from dit_fast.nn.batch_norm import BatchNorm
from tests.helpers.golden import assert_close


def test_batch_norm_is_torch_s():
    ours, theirs = BatchNorm(3, eps=1e-4), torch.nn.BatchNorm2d(3, eps=1e-4)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    for _ in range(2):
        x = (3 * torch.randn(4, 3, 5, 6) + 1).requires_grad_()
        weight = torch.randn(4, 3, 5, 6)
        found, expected = (torch.autograd.grad((f(x) * weight).sum(), [x, *f.parameters()]) for f in (ours, theirs))
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, 1e-5)
    for name, tensor in theirs.state_dict().items():
        assert_close(ours.state_dict()[name].double(), tensor.double(), 1e-6)
    assert_close(ours.running(x), theirs.eval()(x), 1e-6)
    assert ours.num_batches_tracked == 2
