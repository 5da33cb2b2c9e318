"""What the proof of patch.apply must see: modules that look like the published ones and do something else."""

import pickle
import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dit_fast import patch
from dit_fast.patch import proof
from tests.helpers.cases import loop_over
from tests.helpers.published_models import Block, Mlp, SwappedBlock, Transformer, inputs, leaves


class DropPath(nn.Module):
    def forward(self, x):
        return x * (torch.rand(len(x), 1, 1) >= 1e-3) if self.training else x


class StochasticDepthBlock(Block):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.drop_path = DropPath()

    def forward(self, x, c):
        return x + self.drop_path(super().forward(x, c) - x)


class RecordingBlock(Block):
    def forward(self, x, c):
        self.feature = super().forward(x, c)
        return self.feature


class CountingBlock(Block):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, c):
        self.calls += 1
        return super().forward(x, c)


class ScaledBlock(Block):
    """By one, until a checkpoint says otherwise."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.register_buffer("layer_scale", torch.ones(1))

    def forward(self, x, c):
        return x + self.layer_scale * (super().forward(x, c) - x)


class ShiftedBlock(Block):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.offset = torch.zeros(1)  # no buffer

    def forward(self, x, c):
        return super().forward(x, c) + self.offset


class TrainingBlock(Block):
    def forward(self, x, c):
        return super().forward(x, c) * (0.5 if self.training else 1)


class OtherEpsBlock(Block):
    def forward(self, x, c):
        self.norm1, norm1 = nn.LayerNorm(x.shape[-1], elementwise_affine=False, eps=1e-5), self.norm1
        out = super().forward(x, c)
        self.norm1 = norm1
        return out


class StoppedBlock(Block):
    def forward(self, x, c):
        return super().forward(x, c.detach())


class LongBlock(Block):
    def forward(self, x, c):
        return super().forward(x, c) * (2 if x.shape[1] > 64 else 1)


class AloneBlock(Block):
    def forward(self, x, c):
        return super().forward(x, c) * (2 if len(x) == 1 else 1)


class ClampedBlock(Block):
    def forward(self, x, c):
        return super().forward(x.clamp(-100, 100), c)


class HalfBlock(Block):
    def forward(self, x, c):
        return super().forward(x, c) * (1 if x.dtype == torch.float32 else 0.5)


class WideningBlock(Block):
    def forward(self, x, c):
        return super().forward(x, c).float()


class WideBlock(Block):
    def forward(self, x, c):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x, c)


class CheckpointedBlock(Block):
    def forward(self, x, c):
        return checkpoint(super().forward, x, c, use_reentrant=False) if self.training else super().forward(x, c)


@loop_over(
    ("block", "reason"),
    [
        (StoppedBlock, "give input 1 different gradients"),
        (LongBlock, "differ on a small input .1 x 256 tokens"),
        (AloneBlock, "differ on a small input .1 x"),
        (ClampedBlock, "differ on a small input .1 x 256"),
        (HalfBlock, "tokens in bfloat16"),
        (WideningBlock, "tokens in bfloat16"),
        (SwappedBlock, "differ on a small input"),
        (OtherEpsBlock, "differ on a small input"),
        (ScaledBlock, "differ on a small input"),
        (ShiftedBlock, "differ on a small input"),
        (TrainingBlock, "differ on a small input .* in train mode"),
        (StochasticDepthBlock, "draw different random numbers, in train mode"),
        (RecordingBlock, "only one of .* changes feature"),
        (CountingBlock, "only one of .* changes calls"),
        (WideBlock, "turns autocast off for adaLN_modulation, the replacement does not"),
        (CheckpointedBlock, "checkpoints activations .* runs again in the backward., .* in train mode"),
    ],
)
def test_a_block_that_does_something_else_is_left_alone(block, reason):
    torch.manual_seed(0)
    model = Transformer("sit", depth=2, block=block)
    report = patch.apply(model).report
    assert set(report.refused) == {"blocks.0", "blocks.1"}
    assert all(re.search(reason, why) for why in report.refused.values())
    assert "forward" not in vars(model.blocks[0])


def test_a_model_that_checkpoints_its_blocks_goes_on_doing_so():
    model = Transformer("output")
    model.checkpoints = True
    report = patch.apply(model).report
    assert list(report.refused) == [""]
    assert "with 'output' its own forward checkpoints activations (blocks.0 runs again" in report.refused[""]
    assert report.replaced["blocks.0"] == "adaln"


def test_dropout_that_is_no_module_is_seen():
    class FunctionalDropout(Mlp):
        def forward(self, x):
            return F.dropout(super().forward(x), 1e-3, self.training)

    model = Transformer("sit", depth=2)
    model.blocks[1].mlp = FunctionalDropout(32)
    refused = patch.apply(model).report.refused
    assert list(refused) == ["blocks.1.mlp"]
    assert "draw different random numbers" in refused["blocks.1.mlp"]


def test_modules_share_a_proof_only_if_all_but_their_parameters_is_equal(monkeypatch):
    class Scaled(Mlp):
        scale = 1.0

        def forward(self, x):
            return super().forward(x) * self.scale

    ran = []
    disagreement = proof.disagreement
    monkeypatch.setattr(proof, "disagreement", lambda entry: ran.append(entry.path) or disagreement(entry))
    model = Transformer("sit", depth=5)
    for block in model.blocks:
        block.mlp = Scaled(32)
    model.blocks[1].mlp.scale = 2.0
    model.blocks[2].mlp.table = [3]
    model.blocks[3].mlp.drop1 = nn.Identity()
    report = patch.apply(model, ops={"gelu_mlp"}).report
    assert ran == [f"blocks.{block}.mlp" for block in (0, 1, 2, 3)]
    assert list(report.refused) == ["blocks.1.mlp"]


def test_a_forward_of_ours_or_out_of_a_pickle_needs_no_proof_of_its_own(monkeypatch):
    ran = []
    disagreement = proof.disagreement
    monkeypatch.setattr(proof, "disagreement", lambda entry: ran.append(entry.path) or disagreement(entry))
    model = Transformer("sit", depth=3)
    patch.apply(model, ops={"gelu_mlp"})
    patch.apply(pickle.loads(pickle.dumps(model)), ops={"gelu_mlp"})
    patch.apply(model, ops={"adaln"})
    assert ran == ["blocks.0.mlp", "blocks.0.mlp", "blocks.0", "final_layer"]


@loop_over("later", [False, True])
@loop_over("kind", ["input", "output"])
def test_wiring_and_collected_features_are_told_apart(kind, later):
    torch.manual_seed(0)
    model = Transformer(kind, later=later)
    model.block_diversity_loss = False  # what it collects is proven for the flag's other value, too
    handle = patch.apply(model, ops=patch.OPS)
    assert handle.report.replaced[""] == "long_skip"
    for flag in (False, True):
        for training in (False, True):
            model.train(training).block_diversity_loss = flag
            torch.manual_seed(1)
            ours = model(*inputs())
            torch.manual_seed(1)
            theirs = Transformer.forward(model, *inputs())
            assert list(ours) == list(theirs)
            for left, right in zip(leaves(ours), leaves(theirs), strict=True):
                torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@loop_over(("kind", "wrong"), [("input", "output"), ("output", "input")])
def test_a_given_wiring_must_be_the_right_one(kind, wrong):
    reason = patch.apply(Transformer(kind), skip_wiring=wrong).report.refused[""]
    assert f"'{wrong}' is not the wiring of its forward" in reason
    assert patch.apply(Transformer(kind), skip_wiring=kind).report.replaced[""] == "long_skip"


def test_a_norm_that_somebody_else_reads_is_left_alone():
    class Reads(Transformer):
        def fuse(self, k, x, skip):
            normalised = self.skip_norms[k](torch.cat([x, skip], dim=-1))
            return self.skip_linears[k](normalised, x) + 0.1 * normalised.chunk(2, -1)[0]

    assert "neither wiring is that of its forward" in patch.apply(Reads("output")).report.refused[""]


def test_without_its_skips_the_model_runs_its_own_forward():
    class Switched(Transformer):
        def fuse(self, k, x, skip):
            return super().fuse(k, x, skip) if self.skip_layer_connection else x

    torch.manual_seed(0)
    model = Switched("output").eval()
    model.skip_layer_connection = True
    patch.apply(model, ops=patch.OPS)
    model.skip_layer_connection = False
    for ours, theirs in zip(leaves(model(*inputs())), leaves(Switched.forward(model, *inputs())), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_does_not_matter_what_stands_around_apply():
    for around in (torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16)):
        model = Transformer("output", depth=2)
        with around:
            assert not patch.apply(model).report.refused, around
