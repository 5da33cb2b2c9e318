"""DiT (arXiv 2212.09748): the transformer that SiT took over, here with DDPM's whole steps and a learned variance."""

from dataclasses import dataclass

from dit_fast.models.base import PRESETS
from dit_fast.models.sit import SiT, presets
from dit_fast.options import setting

PRESETS.update(presets("DiT"))


class DiT(SiT):
    """Noise and variance of a diffusion transformer, [N, 2C, H, W], at steps t int64 [N] in 0 .. 999.

    Everything else is as in SiT: sizes, long skips, query and key normalisation. t enters the embedder as it is.
    """

    learns_variance = True

    @dataclass(frozen=True, kw_only=True)
    class Config(SiT.Config):
        """The transformer for `objective=ddpm`."""

        name: str = setting("DiT-XL/2", "Size and patch size: DiT-Nano/2 or DiT-{S, B, L, XL}/{2, 4, 8}")
