"""REPA-E (arXiv 2504.10483): the autoencoder is trained with the diffusion transformer, by the alignment loss.

The model denoises latents of the run's own AutoencoderKL, made of the shards' images (field "image") and normalised by
a batch norm. Autoencoder, discriminator and batch norm are modules of the model, so they are averaged, saved and
restored with it; samples are decoded by that autoencoder.

One backward pass stands for the three steps of the published code, each of which has an optimizer of its own:

    autoencoder     L1 + perceptual + 1e-6 KL + 0.1 generator + 1.5 alignment through a frozen transformer
    discriminator   hinge loss of the images and of the detached reconstructions
    transformer     flow matching + 0.5 alignment of the detached latents

All three are functions of the parameters as they are before the step: the latents and reconstructions of the second and
third are those of the first (made before it moved the autoencoder), and the alignment of the first runs before the
transformer moves. The gradient of each with respect to the parameters of another is cut: the first is shown detached
parameters of transformer, projectors and discriminator, the second and third detached values. So the gradient of the
sum is, parameter by parameter, the gradient of the one loss that the published code would take it of, and three groups
of one AdamW, each clipped by its own norm, move as three AdamWs. The batch norm too is used by the first loss with its
running statistics before they move, and moves once, in the third. What differs: a step whose gradient is not finite
changes none of them, here, where three optimizers would each decide for themselves.
"""

import hashlib
import json
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from dit_fast.autoencoders.from_diffusers import DiffusersAutoencoder, plain
from dit_fast.autoencoders.lpips import LPIPS
from dit_fast.data import DatasetInfo
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.methods.base import NORM, NORM_EPS, VAE, Term
from dit_fast.methods.repa import Alignment, repa_loss
from dit_fast.methods.targets import IMAGE
from dit_fast.models import Backbone, Taps
from dit_fast.nn.batch_norm import BatchNorm
from dit_fast.nn.discriminator import PatchGAN
from dit_fast.objectives import Context
from dit_fast.ops.draws import Key
from dit_fast.options import setting
from dit_fast.philox import Stream
from dit_fast.published import read_state
from dit_fast.tree import Tree, leaves, like, relabelled

MOMENTUM = 0.1  # of the batch norm
DISCRIMINATOR = "discriminator"


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL of N(mean, exp(logvar)) from N(0, 1), summed over the values of a sample and averaged over samples; 0-d."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """Minus the mean of a discriminator's logits of reconstructions; 0-d."""
    return -fake.mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of its logits: half of mean max(0, 1 - real) + mean max(0, 1 + fake); 0-d."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


class Encoded(NamedTuple):
    """A micro-batch between `state` and `terms`: images [N, 3, S, S] in [-1, 1], the posterior's mean and logvar,
    latents drawn from it, and the same normalised by the running statistics; with gradients."""

    images: Tensor
    mean: Tensor
    logvar: Tensor
    latents: Tensor
    normalised: Tensor


class REPAE(Alignment):
    """The alignment of REPA, of the transformer and, through it, of the autoencoder; and the autoencoder's losses."""

    name = "repa_e"
    title = "REPA-E"
    about = "the autoencoder is trained with the model, by the alignment of one block with a frozen image encoder"
    functional = True
    averaged = (f"{NORM}.running_mean", f"{NORM}.running_var")

    @dataclass(frozen=True, kw_only=True)
    class Config(Alignment.Config):
        """The autoencoder, what it is trained for, and which block is aligned with what."""

        name: ClassVar[str] = "repa_e"
        vae: str = setting("", "diffusers:DIR of an AutoencoderKL; empty = that of the data set", resumes=True)
        statistics: str = setting(
            "", "File with latents_scale and latents_bias, where the batch norm starts; empty = scale and shift",
            resumes=True,
        )  # fmt: skip
        vae_weight: float = setting(1.5, "Weight of the alignment in the autoencoder's loss", "[0, 1e6]")
        l1_weight: float = setting(1.0, "Weight of the mean absolute error of the reconstruction", "[0, 1e6]")
        perceptual_weight: float = setting(1.0, "Weight of LPIPS; 0 = none, as without its files", "[0, 1e6]")
        perceptual_vgg16: str = setting("", "File of torchvision's vgg16", resumes=True)
        perceptual_heads: str = setting(
            "", "File of the heads of LPIPS for it (vgg.pth of lpips or torchmetrics)", resumes=True
        )
        kl_weight: float = setting(1e-6, "Weight of the KL divergence, summed over a latent", "[0, 1e6]")
        gan_weight: float = setting(0.1, "Weight of the generator's loss; 0 = no discriminator", "[0, 1e6]")
        gan_start: int = setting(0, "Step from which it and the discriminator's loss count", "[0, 1e9]")
        discriminator: str = setting("", "File of a PatchGAN to start from; empty = a new one", resumes=True)
        discriminator_width: int = setting(64, "Channels of its first convolution", "[1, 4096]")
        discriminator_layers: int = setting(3, "Its convolutions of stride 2", "[1, 8]")
        discriminator_weight: float = setting(1.0, "Factor of its loss", "[0, 1e6]")
        vae_lr: float = setting(1e-4, "Learning rate of the autoencoder; 0 = frozen", "[0, 1e30]")
        vae_clip: float = setting(1.0, "Largest norm of its gradient; 0 = none", "[0, 1e30]")
        discriminator_lr: float = setting(1e-4, "Learning rate of the discriminator", "[0, 1e30]")
        discriminator_clip: float = setting(1.0, "Largest norm of its gradient; 0 = none", "[0, 1e30]")

    def __init__(self, config: Any, model: Backbone, data: DatasetInfo):
        """Adds `projectors`, `vae`, `bn` and `discriminator`.

        Raises DataError for shards without images and for an autoencoder that cannot be read, ConfigError for one that
        cannot be trained or has other latents than the model denoises, and for a perceptual term without its files,
        CheckpointError for files of other weights.
        """
        super().__init__(config, model, data)
        self.bind(model, data, class_token=None)
        size = data.field(IMAGE).shape[-1]
        self.fields = tuple(dict.fromkeys((IMAGE, *self.fields)))
        device = next(model.parameters()).device
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            autoencoder = _autoencoder(config, data)
            perceptual = _perceptual(config)
        _check_latents(autoencoder, model, size, config)
        self.vae, self.autoencoder = autoencoder.module.requires_grad_(True).to(device), plain(autoencoder.config)
        self.bn = BatchNorm(autoencoder.channels, NORM_EPS, MOMENTUM, affine=False)
        _start(self.bn, config, autoencoder, data)
        self.bn.to(device)
        self.discriminator = _discriminator(config, size) if config.gan_weight else None
        self._perceptual = [] if perceptual is None else [perceptual.to(device)]  # in no state_dict
        self.trunk = model.trunk(self.block)  # before the model has what this adds
        for name, module in ((VAE, self.vae), (NORM, self.bn), (DISCRIMINATOR, self.discriminator)):
            if module is not None:
                model.add_head(name, module)
        self.teachers = (self.trunk,)
        _share(self.trunk, model)
        digests = {"vae": hashlib.sha256(json.dumps(self.autoencoder, sort_keys=True).encode()).hexdigest()}
        if perceptual is not None:
            digests["perceptual"] = perceptual.identity.rpartition(":")[2]
        self.digests = {**self.targets.digests, **digests}
        self._encoded: Encoded | None = None

    @staticmethod
    def stages(config: Any, run: Any) -> list[Any]:
        if "self_transcendence" in [other.name for other in run.methods]:
            raise ConfigError(
                f"{config.name} moves the latents while it trains, and the frozen teacher of self_transcendence knows "
                "those of another autoencoder; remove one of them"
            )
        return [run]

    def param_groups(self) -> list[dict[str, Any]]:
        config = self.config
        groups = [{"params": list(self.vae.parameters()), "lr": config.vae_lr, "clip": config.vae_clip}]
        if self.discriminator is not None:
            own = list(self.discriminator.parameters())
            groups.append({"params": own, "lr": config.discriminator_lr, "clip": config.discriminator_clip})
        return groups

    def state(self, x: Tree, batch: Mapping[str, Tensor], key: Key) -> Tree:
        """Latents drawn from the autoencoder's posterior in the place of x's, normalised; without gradients."""
        images = batch[IMAGE].to(next(self.vae.parameters()).dtype) / 127.5 - 1
        posterior = self.vae.encode(images).latent_dist
        wide = torch.promote_types(images.dtype, torch.float32)
        mean, logvar = posterior.mean.to(wide), posterior.logvar.to(wide)
        noise = key.normal(Stream.POSTERIOR, tuple(mean.shape[1:]))
        latents = mean + (0.5 * logvar).exp() * noise
        self._encoded = Encoded(images, mean, logvar, latents, self.bn.running(latents))
        return like(x, {**leaves(x), "image": self.bn(latents.detach())})

    def kind(self, number: int) -> Hashable:
        return self.active(number), number >= self.config.gan_start

    def terms(self, context: Context) -> dict[str, Term]:
        if self._encoded is None:
            raise ConfigError("repa_e: terms without a state of the same micro-batch")
        encoded, self._encoded, config = self._encoded, None, self.config
        decoded = self.vae.decode(encoded.latents).sample
        reconstruction = decoded.to(torch.promote_types(decoded.dtype, torch.float32))
        own, through = self._aligned(context, context.features[self.block], self.heads), self._frozen(context, encoded)
        found = {
            "alignment": own,
            "vae_alignment": Term(through.value, config.vae_weight),
            "l1": Term(F.l1_loss(reconstruction, encoded.images), config.l1_weight),
            "kl": Term(kl_divergence(encoded.mean, encoded.logvar), config.kl_weight),
        }
        for network in self._perceptual:
            distance = network(encoded.images, reconstruction).mean()
            found["perceptual"] = Term(distance, config.perceptual_weight)
        if self.discriminator is not None and context.number >= config.gan_start:
            fake = functional_call(self.discriminator, _detached(self.discriminator), (reconstruction,))
            found["generator"] = Term(generator_loss(fake), config.gan_weight)
            logits = [self.discriminator(images) for images in (encoded.images, reconstruction.detach())]
            found["discriminator"] = Term(discriminator_loss(*logits), config.discriminator_weight)
        return {f"{self.name}/{name}": term for name, term in found.items()}

    def _frozen(self, context: Context, encoded: Encoded) -> Term:
        """The alignment of latents with a gradient, by the parameters without one, at the same times and noise.

        With all labels: the published pass is one in eval mode, which drops none.
        """
        _share(self.trunk, context.model)
        taps = Taps({self.block})
        clean = like(context.x, {**leaves(context.x), "image": encoded.normalised})
        noised, _ = context.objective.interpolate(clean, context.noise, context.t)
        self.trunk(noised, context.times, relabelled(context.y, context.batch["label"]), taps, stop=self.block)
        heads = [lambda tokens, head=head: functional_call(head, _detached(head), (tokens,)) for head in self.heads]
        return self._aligned(context, taps.features[self.block], heads)

    def _aligned(self, context: Context, feature: Tensor, heads: Any) -> Term:
        losses = []
        for head, name in zip(heads, self.targets.features, strict=True):
            target = context.batch[name]
            losses.append(repa_loss(head(feature[:, feature.shape[1] - target.shape[1] :]), target))
        return self.aligned(losses)


def _detached(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def _share(trunk: nn.Module, model: nn.Module) -> None:
    """Gives the parameters of a trunk the memory of the model's, which engines move. Unlike detached parameters in a
    functional call, it is still there when a checkpointed block is computed again in the backward pass.
    """
    live = dict(model.named_parameters())
    for name, parameter in trunk.named_parameters():
        parameter.data = live[name].data


def _autoencoder(config: Any, data: DatasetInfo) -> DiffusersAutoencoder:
    spec, key = config.vae or data.autoencoder, "methods.repa_e.vae"
    kind, _, folder = spec.partition(":")
    if kind != "diffusers" or not folder:
        whose = "" if config.vae else "the data set's autoencoder is "
        raise ConfigError(f"{key}: {whose}'{spec}', which cannot be trained; give diffusers:DIR of an AutoencoderKL")
    autoencoder = DiffusersAutoencoder.load(folder)
    if not autoencoder.stochastic:
        raise ConfigError(f"{key}: {spec} holds an AutoencoderTiny; give diffusers:DIR of an AutoencoderKL")
    return autoencoder


def _check_latents(autoencoder: DiffusersAutoencoder, model: Backbone, size: int, config: Any) -> None:
    """Raises ConfigError unless the latents of the images are what the model denoises."""
    side = size / autoencoder.factor
    if (autoencoder.channels, side, side) != model.shapes["image"]:
        made = [autoencoder.channels, *2 * [f"{side:g}"]]
        raise ConfigError(
            f"methods.repa_e.vae={config.vae}: makes latents [{', '.join(map(str, made))}] of images of {size} pixels, "
            f"and the model denoises {list(model.shapes['image'])}; build the shards with this autoencoder"
        )


def _perceptual(config: Any) -> LPIPS | None:
    if not config.perceptual_weight:
        return None
    if not (config.perceptual_vgg16 and config.perceptual_heads):
        raise ConfigError(
            "methods.repa_e.perceptual_weight needs the weights of LPIPS: set methods.repa_e.perceptual_vgg16 and "
            "perceptual_heads to their files, or the weight to 0"
        )
    return LPIPS(config.perceptual_vgg16, config.perceptual_heads)


@torch.no_grad()
def _start(bn: BatchNorm, config: Any, autoencoder: DiffusersAutoencoder, data: DatasetInfo) -> None:
    """The running statistics of latents that scale and shift would normalise: mean = -shift / scale, var = 1 / scale^2.

    In a file, latents_bias is the mean and latents_scale one over the deviation, as published.
    """
    if config.statistics:
        found = read_state(config.statistics).tensors
        for name in ("latents_scale", "latents_bias"):
            if name not in found or found[name].numel() not in (1, len(bn.running_mean)):
                raise CheckpointError(
                    f"{config.statistics}: holds no '{name}' of {len(bn.running_mean)} numbers; give the file with the "
                    "latents' statistics"
                )
        scale, mean = (found[name].flatten() for name in ("latents_scale", "latents_bias"))
    else:
        of: Any = autoencoder if config.vae else data
        scale, shift = (torch.as_tensor(value, dtype=torch.float64) for value in (of.scale, of.shift))
        mean = -shift / scale
    bn.running_mean.copy_(mean)
    bn.running_var.copy_(scale.double() ** -2)


def _discriminator(config: Any, size: int) -> PatchGAN:
    layers = config.discriminator_layers
    if size < (least := PatchGAN.least_size(layers)):
        raise ConfigError(
            f"methods.repa_e.discriminator_layers={layers} needs images of at least {least} pixels, these have {size}; "
            f"set it to {max(1, int(math.log2(size / 3)))} or less"
        )
    found = PatchGAN(config.discriminator_width, layers)
    if config.discriminator:
        state = {name.removeprefix("main."): x for name, x in read_state(config.discriminator).tensors.items()}
        statistics = ("running_mean", "running_var", "num_batches_tracked")  # which ours does not keep
        kept = {name: x for name, x in state.items() if name.rpartition(".")[2] not in statistics}
        own = found.state_dict()
        for name in own.keys() | kept.keys():
            if name not in own or name not in kept or own[name].shape != kept[name].shape:
                raise CheckpointError(
                    f"{config.discriminator}: '{name}' is not as in a PatchGAN of width {config.discriminator_width} "
                    f"and {layers} layers; set methods.repa_e.discriminator_width and discriminator_layers to its own"
                )
        found.load_state_dict(kept)
    return found
