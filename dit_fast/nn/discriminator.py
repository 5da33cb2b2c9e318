"""PatchGAN (Isola et al., arXiv 1611.07004), as autoencoders are trained with it: a logit for each patch."""

from torch import nn

from dit_fast.nn.batch_norm import BatchNorm


class PatchGAN(nn.Sequential):
    """Images [N, 3, H, W] in [-1, 1] to logits [N, 1, h, w].

    `layers` convolutions of stride 2, the first with `width` channels, each with twice as many as the one before (at
    most 8 times that), then two of stride 1; all are 4 x 4 and padded by 1. All but first and last are followed by a
    batch norm, which always uses the statistics of the batch, and all but the last by a leaky ReLU. Weights are drawn
    from N(0, 0.02^2), those of the norms from N(1, 0.02^2).
    Layers have the numbers, and parameters the names, of the published ones.
    """

    def __init__(self, width: int = 64, layers: int = 3):
        widths = [width * min(2**number, 8) for number in range(layers + 1)]
        found: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for number in range(1, layers + 1):
            stride = 2 if number < layers else 1
            convolution = nn.Conv2d(widths[number - 1], widths[number], 4, stride, 1, bias=False)
            found += [convolution, BatchNorm(widths[number], tracked=False), nn.LeakyReLU(0.2)]
        super().__init__(*found, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, BatchNorm):
                nn.init.normal_(module.weight, 1.0, 0.02)

    @staticmethod
    def least_size(layers: int) -> int:
        """The smallest side of an image of which a logit is left."""
        return 3 * 2**layers
