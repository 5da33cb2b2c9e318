"""REPA-E: one backward pass against the published three steps, its runs, and what is sampled from them."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dit_fast.data.field import Field
from dit_fast.methods import METHODS, build_methods
from dit_fast.methods.repa_e import REPAE
from dit_fast.objectives import Flow
from dit_fast.philox import Key, Stream
from dit_fast.runs import OptimizerConfig, TrainConfig
from dit_fast.train.engine import SingleEngine
from dit_fast.train.loss import TrainingLoss
from dit_fast.world import World
from tests.helpers.parts import WIDTH
from tests.helpers.tiny_sit import tiny_sit
from tests.helpers.tiny_vae import save_vae

SHAPES = {"features": (16, WIDTH), "image": (3, 16, 16)}
SMALL = {
    "encoder_depth": 2, "projector_width": 8, "perceptual_weight": 0.0, "discriminator_width": 4,
    "discriminator_layers": 1,
    "vae_lr": 3e-3, "discriminator_lr": 5e-3, "vae_clip": 0.7, "discriminator_clip": 0.2, "kl_weight": 1e-2,
}  # fmt: skip
WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """Of latents [2, 8, 8]."""
    return save_vae(tmp_path_factory.mktemp("vae") / "vae", channels=2, levels=2, scaling_factor=0.5)


def info(vae, **changes):
    fields = {name: Field(f"{name}.npy", shape, "float16") for name, shape in SHAPES.items()}
    facts = {"autoencoder": f"diffusers:{vae}", "scale": (2.0, 4.0), "shift": (1.0, -2.0), **changes}
    return SimpleNamespace(field=lambda name: fields[name], **facts)


def training(vae, *names, model=(), **options):
    torch.manual_seed(0)
    network = tiny_sit(in_channels=2, num_classes=5, **dict(model))
    configs = [REPAE.Config(**{**SMALL, **options}), *(METHODS[name].Config() for name in names)]
    methods = build_methods(configs, network, info(vae))
    return TrainingLoss(network, Flow(Flow.Config(), network), methods, seed=0)


def batch(n=3, first=0):
    generator = torch.Generator().manual_seed(first)
    return {
        "moments": torch.zeros(n, 2, 2, 8, 8),
        "label": torch.randint(0, 5, (n,), generator=generator),
        "position": torch.arange(first, first + n),
        "features": torch.randn(n, *SHAPES["features"], generator=generator),
        "image": torch.randint(0, 256, (n, *SHAPES["image"]), generator=generator, dtype=torch.uint8),
    }


def engine_of(loss, lr=2e-3, **optimizer):
    config = TrainConfig(optimizer=OptimizerConfig(lr=lr, grad_clip=0.5, **optimizer))
    return SingleEngine(loss, config, WORLD, loss.methods[0].param_groups())


class ThreeSteps:
    """The published loop, one optimizer after the other, on copies of the same modules."""

    def __init__(self, loss):
        self.model = copy.deepcopy(loss.model)
        self.vae, self.discriminator = self.model.vae, self.model.discriminator
        del self.model.vae, self.model.discriminator, self.model.bn
        self.bn = torch.nn.BatchNorm2d(2, eps=1e-4, momentum=0.1, affine=False).double()
        self.bn.running_mean.copy_(loss.model.bn.running_mean)
        self.bn.running_var.copy_(loss.model.bn.running_var)
        parts = ((self.model, 2e-3), (self.vae, 3e-3), (self.discriminator, 5e-3))
        trained = [[p for p in module.parameters() if p.requires_grad] for module, _ in parts]
        self.optimizers = [
            torch.optim.AdamW(own, lr=lr, weight_decay=0.0) for own, (_, lr) in zip(trained, parts, strict=True)
        ]

    def step(self, network, loss, bound):
        optimizer = self.optimizers[(self.model, self.vae, self.discriminator).index(network)]
        optimizer.zero_grad()
        loss.backward()
        own = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(own, bound)
        optimizer.step()

    def align(self, z, noise, t, batch):
        noised = (1 - t.view(-1, 1, 1, 1)) * z + t.view(-1, 1, 1, 1) * noise
        output, features = self.model(noised, t, batch["label"], taps=(1,))
        cosine = F.cosine_similarity(self.model.projectors[0](features[1]), batch["features"].double(), dim=-1)
        return output, -cosine.mean()

    def __call__(self, batch):
        key = Key(0, batch["position"])
        noise = key.normal(Stream.NOISE, (2, 8, 8)).double()
        t = key.uniform(Stream.TIME, ()).double()
        images = batch["image"].double() / 127.5 - 1
        posterior = self.vae.encode(images).latent_dist
        z = posterior.mean + posterior.std * key.normal(Stream.POSTERIOR, (2, 8, 8)).double()
        reconstruction = self.vae.decode(z).sample
        for network in (self.model, self.discriminator):
            network.requires_grad_(False)
        self.bn.eval()
        loss = (images - reconstruction).abs().mean() + 1e-2 * posterior.kl().mean()
        loss = loss - 0.1 * self.discriminator(reconstruction).mean() + 1.5 * self.align(self.bn(z), noise, t, batch)[1]
        self.step(self.vae, loss, 0.7)
        self.discriminator.requires_grad_(True)
        real, fake = self.discriminator(images), self.discriminator(reconstruction.detach())
        self.step(self.discriminator, (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2, 0.2)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name != "pos_embed")
        self.bn.train()
        clean = self.bn(z.detach())
        output, alignment = self.align(clean, noise, t, batch)
        flow = (output - (noise - clean)).square().mean()
        self.step(self.model, flow + 0.5 * alignment, 0.5)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_one_backward_is_the_published_three_steps(vae, checkpointed):
    loss = training(vae, model={"checkpoint_blocks": checkpointed}).double()
    draw = loss.objective.draw_times
    loss.objective.draw_times = lambda key: draw(key).double()
    published, engine = ThreeSteps(loss), engine_of(loss)
    before = copy.deepcopy(loss.model.state_dict())
    for step in range(3):
        engine.train_step([batch(first=3 * step)], step, 2e-3)
        published(batch(first=3 * step))
    parts = (("", published.model), ("vae.", published.vae), ("discriminator.", published.discriminator))
    expected = {f"{name}{key}": x for name, module in parts for key, x in module.state_dict().items()}
    expected |= {f"bn.{key}": x for key, x in published.bn.state_dict().items()}
    found = loss.model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-7, atol=1e-9, msg=name)
    still = [name for name in found if torch.equal(found[name], before[name])]
    assert still in (["pos_embed"], ["pos_embed", "discriminator.5.bias"])
