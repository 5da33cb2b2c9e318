"""The original SiT (arXiv 2401.08740) and LightningDiT behind our conventions: their time runs from noise to data."""

from torch import Tensor

from dit_fast.models.base import Output, Taps, split
from dit_fast.models.lightningdit import LightningDiT
from dit_fast.models.sit import SiT
from dit_fast.tree import Tree, image


class ReversedSiT(SiT):
    """Official SiT weights as they are; takes our t and returns our v.

    Inside: the network sees 1 - t, its velocity changes sign, and only the first `in_channels` of its `head_channels`
    output channels are used (the published head has twice as many; the others never train and stay bit for bit).
    `sample` guides three channels of it by default, as the released sampler does.
    """

    cfg_channels = "first_three"

    def __init__(self, config: SiT.Config, head_channels: int):
        super().__init__(config)
        self.head_channels = head_channels
        self.final_layer = self.new_head(head_channels)

    def compute(self, x: Tree, t: Tensor, y: Tree, taps: Taps, stop: int | None) -> Output | None:
        output = super().compute(x, 1 - t, y, taps, stop)
        return None if output is None else -image(split(output)[0])[:, : self.in_channels]


class ReversedLightningDiT(ReversedSiT, LightningDiT):
    """Official LightningDiT weights as they are, in the same way."""
