"""The original SiT (arXiv 2401.08740) behind our conventions: its time runs from noise (0) to data (1)."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from dit_fast.models.sit import SiT, Through
from dit_fast.nn.final_layer import FinalLayer


class ReversedSiT(SiT):
    """Official SiT weights as they are; takes our t and returns our v.

    Inside: the network sees 1 - t, its velocity changes sign, and only the first `in_channels` of its `head_channels`
    output channels are used (the published head has twice as many; the others never train and stay bit for bit).
    `sample` guides three channels of it by default, as the released sampler does.
    """

    cfg_channels = "first_three"

    def __init__(self, *, head_channels: int, **arguments: Any):
        super().__init__(**arguments)
        self.head_channels = head_channels
        self.final_layer = FinalLayer(self.hidden_size, self.patch_size, head_channels)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        taps: Iterable[int] = (),
        drop: Tensor | None = None,
        through: Through | None = None,
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """As `SiT.forward`."""
        result = super().forward(x, 1 - t, y, taps, drop, through)
        if isinstance(result, tuple):
            output, features = result
            return -output[:, : self.in_channels], features
        return -result[:, : self.in_channels]
