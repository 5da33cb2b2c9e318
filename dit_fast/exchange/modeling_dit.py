"""DiT as it was trained, for diffusers; `dit-fast export` puts a copy beside the weights.

diffusers' own DiTTransformer2DModel spaces the frequencies of its time embedding by 127, the published DiT by 128: the
same weights then give other images. Everything else is equal.
"""

import functools
from typing import Any

from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps


class PublishedDiT(DiTTransformer2DModel):
    """Its configuration and weights are those of DiTTransformer2DModel."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0)


functools.update_wrapper(PublishedDiT.__init__, DiTTransformer2DModel.__init__)  # diffusers reads the signature
