"""REPA-E: one backward pass against the published three steps, its runs, and what is sampled from them."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dit_fast.analysis.blocks import Inputs, study_blocks
from dit_fast.autoencoders import load_autoencoder
from dit_fast.autoencoders.pixels import decode_images, to_model_space, to_uint8
from dit_fast.checkpoint.run import load_run
from dit_fast.cli import main as cli
from dit_fast.data.field import Field
from dit_fast.errors import UserError
from dit_fast.methods import METHODS, build_methods
from dit_fast.methods.repa_e import REPAE, discriminator_loss, generator_loss, kl_divergence
from dit_fast.nn.discriminator import PatchGAN
from dit_fast.objectives import Flow
from dit_fast.ops.draws import Key
from dit_fast.philox import Stream
from dit_fast.runs import EngineConfig, OptimizerConfig, TrainConfig
from dit_fast.sampling.images import sample_images
from dit_fast.sampling.options import SampleOptions
from dit_fast.sampling.samples import Samples
from dit_fast.train.__main__ import main
from dit_fast.train.engine import SingleEngine
from dit_fast.train.loss import TrainingLoss
from dit_fast.train.optim import STATES
from dit_fast.train.prepare import check_stage
from dit_fast.world import World
from tests.helpers.golden import assert_close
from tests.helpers.no_gpu import no_gpu  # noqa: F401
from tests.helpers.parts import WIDTH, settings
from tests.helpers.shard_sets import build, everything
from tests.helpers.tiny_sit import tiny_sit
from tests.helpers.tiny_vae import save_vae, toy_vae
from tests.helpers.toy_runs import Ranks, arguments, rows, tensors

SHAPES = {"features": (16, WIDTH), "image": (3, 16, 16)}
SMALL = {
    "encoder_depth": 2, "projector_width": 8, "perceptual_weight": 0.0, "discriminator_width": 4,
    "discriminator_layers": 1,
    "vae_lr": 3e-3, "discriminator_lr": 5e-3, "vae_clip": 0.7, "discriminator_clip": 0.2, "kl_weight": 1e-2,
}  # fmt: skip
WORLD = World(0, 1, torch.device("cpu"))
DROPPED = 0.5  # share of labels


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """Of latents [2, 8, 8]."""
    return save_vae(tmp_path_factory.mktemp("vae") / "vae", channels=2, levels=2, scaling_factor=0.5)


def info(vae, **changes):
    fields = {name: Field(f"{name}.npy", shape, "float16") for name, shape in SHAPES.items()}
    facts = {"autoencoder": f"diffusers:{vae}", "scale": (2.0, 4.0), "shift": (1.0, -2.0), **changes}
    return SimpleNamespace(field=lambda name: fields[name], **facts)


def training(place, *names, model=(), label_dropout=0.0, **options):
    torch.manual_seed(0)
    network = tiny_sit(in_channels=2, num_classes=5, **dict(model))
    configs = [REPAE.Config(**{**SMALL, **options}), *(METHODS[name].Config() for name in names)]
    methods = build_methods(configs, network, info(place))
    return TrainingLoss(network, Flow(Flow.Config(), network), methods, seed=0, label_dropout=label_dropout)


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

    def align(self, z, noise, t, batch, labels):
        noised = (1 - t.view(-1, 1, 1, 1)) * z + t.view(-1, 1, 1, 1) * noise
        output, features = self.model(noised, t, labels, taps=(1,))
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
        known = batch["label"]  # the model is in eval mode here, and drops none
        through = self.align(self.bn(z), noise, t, batch, known)[1]
        loss = loss - 0.1 * self.discriminator(reconstruction).mean() + 1.5 * through
        self.step(self.vae, loss, 0.7)
        self.discriminator.requires_grad_(True)
        real, fake = self.discriminator(images), self.discriminator(reconstruction.detach())
        self.step(self.discriminator, (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2, 0.2)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name != "pos_embed")
        self.bn.train()
        clean = self.bn(z.detach())
        labels = torch.where(key.uniform(Stream.LABEL_DROP, ()) < DROPPED, self.model.null(known), known)
        output, alignment = self.align(clean, noise, t, batch, labels)
        flow = (output - (noise - clean)).square().mean()
        self.step(self.model, flow + 0.5 * alignment, 0.5)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_one_backward_is_the_published_three_steps(vae, recompute):
    loss = training(vae, model={"recompute": recompute}, label_dropout=DROPPED).double()
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


def test_a_step_that_is_not_finite_leaves_everything_as_it_was(vae):
    """Transformer, autoencoder, discriminator, batch norm, moments, averages: all or none is moved."""
    loss = training(vae)
    engine = engine_of(loss)
    engine.train_step([batch()], 0, 1e-3)
    held = lambda: {  # noqa: E731
        **{name: tensor.clone() for name, tensor in loss.model.state_dict().items()},
        **{f"{kind}.{name}": x.clone() for kind in STATES for name, x in engine.full_state(kind)},
    }  # fmt: skip
    before, broken = held(), batch()
    broken["features"] = broken["features"] * float("nan")
    assert not engine.train_step([batch(first=3), broken], 1, 1e-3).applied
    assert [name for name, tensor in held().items() if not torch.equal(tensor, before[name])] == []
    assert engine.train_step([batch(first=3)], 2, 1e-3).applied
    moved = held()
    for name in ("blocks.0.attn.qkv.weight", "vae.encoder.conv_in.weight", "discriminator.0.weight", "bn.running_mean"):
        assert not torch.equal(moved[name], before[name])


def test_running_statistics_start_with_the_scale_and_move_once_for_each_micro_batch(vae, tmp_path):
    loss = training(vae)
    bn = loss.model.bn
    assert_close(bn.running_mean, torch.tensor([-0.5, 0.5]), 1e-6)  # -shift / scale of the data set
    assert_close(bn.running_var, torch.tensor([1 / 4, 1 / 16]), 1e-6)
    engine_of(loss).train_step([batch(), batch(first=3)], 0, 1e-3)
    assert bn.num_batches_tracked == 2
    own = training(vae, vae=f"diffusers:{vae}").model.bn  # another autoencoder than the data set's: its own
    assert_close(own.running_var, torch.full((2,), 4.0), 1e-6)
    file = tmp_path / "stats.pt"
    torch.save(
        {"latents_scale": torch.tensor([2.0, 3.0]).view(1, 2, 1, 1), "latents_bias": torch.ones(1, 2, 1, 1)}, file
    )
    read = training(vae, statistics=str(file)).model.bn
    assert_close(torch.cat((read.running_mean, read.running_var)), torch.tensor([1, 1, 1 / 4, 1 / 9]), 1e-6)


def test_the_discriminator_starts_later_and_not_at_all(vae):
    late, none = training(vae, gan_start=2), training(vae, gan_weight=0.0)
    assert ["repa_e/discriminator" in late(batch(), number)[1] for number in (1, 2)] == [False, True]
    assert not hasattr(none.model, "discriminator")
    assert {"repa_e/generator", "repa_e/discriminator"}.isdisjoint(none(batch(), 0)[1])


def test_the_losses_of_an_autoencoder():
    mean, logvar = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    normal = torch.distributions.Normal
    pair = (normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0))
    assert_close(kl_divergence(mean, logvar), torch.distributions.kl_divergence(*pair).sum() / 2, 1e-5)
    real, fake = torch.tensor([0.5, 3.0]), torch.tensor([-2.0, 1.0])
    assert_close(discriminator_loss(real, fake), torch.tensor(0.5 * (0.25 + 1.0)), 1e-6)
    assert_close(generator_loss(fake), torch.tensor(0.5), 1e-6)


def test_a_published_discriminator_is_read(vae, tmp_path):
    state = {f"main.{name}": tensor for name, tensor in PatchGAN(4, 1).state_dict().items()}
    torch.save(state | {"main.3.running_mean": torch.zeros(4)}, tmp_path / "disc.pt")
    model = training(vae, discriminator=str(tmp_path / "disc.pt")).model
    assert torch.equal(model.discriminator[0].weight, state["main.0.weight"])


RUN = ("engine.precision=bf16", "engine.activation_checkpointing=full", "run.checkpoint_every=2")


@pytest.fixture(scope="module")
def run(token_shards, tmp_path_factory):
    """Four steps of two micro-batches each, with previews."""
    folder = tmp_path_factory.mktemp("run") / "run"
    more = ("engine.micro_batch=4", "preview.every=4", "preview.num_steps=2", "methods.repa_e.vae_lr=1e-3")
    assert main(arguments(token_shards, folder, *settings(("repa_e",), 4), *RUN, *more)) == 0
    return folder


def test_a_killed_run_goes_on_with_equal_bits(run, token_shards, tmp_path, monkeypatch):
    real, killed = SingleEngine.train_step, tmp_path / "killed"

    def train_step(self, batches, step, lr):
        if step == 3:
            raise RuntimeError("killed")
        return real(self, batches, step, lr)

    more = ("engine.micro_batch=4", "preview.every=4", "preview.num_steps=2", "methods.repa_e.vae_lr=1e-3")
    line = arguments(token_shards, killed, *settings(("repa_e",), 4), *RUN, *more)
    monkeypatch.setattr(SingleEngine, "train_step", train_step)
    assert main(line) == 1
    monkeypatch.setattr(SingleEngine, "train_step", real)
    assert main(line) == 0
    ours, theirs = tensors(killed, 4), tensors(run, 4)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert rows(killed) == rows(run)
    assert (killed / "samples/step_00000004.png").read_bytes() == (run / "samples/step_00000004.png").read_bytes()


def test_its_checkpoint_holds_and_averages_everything_that_moves(run):
    first, last = tensors(run, 2), tensors(run, 4)
    names = ("vae.decoder.conv_out.weight", "discriminator.0.weight", "bn.running_mean", "bn.running_var")
    for name in names:
        assert not torch.equal(first[f"model/{name}"], last[f"model/{name}"])
        assert not torch.equal(last[f"ema/{name}"], last[f"model/{name}"])
    assert last["model/bn.num_batches_tracked"] == 8
    assert not any("trunk" in name for name in last)


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_samples_are_decoded_by_the_run_s_own_autoencoder(run, weights, tmp_path):
    """`Preview` and `dit-fast sample` both; the data set's, a patch PCA, is not asked."""
    loaded, held = load_run(run, weights), tensors(run, 4)
    latents = torch.randn(2, 12, 4, 4)
    mean, var = (held[f"{weights}/bn.running_{name}"].view(-1, 1, 1) for name in ("mean", "var"))
    module = loaded.autoencoder.module
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, held[f"{weights}/vae.{name}"])
    expected = to_uint8(module.decode(latents * (var + 1e-4).sqrt() + mean).sample.detach().numpy(), "")
    assert np.abs(decode_images(latents, loaded.autoencoder, loaded.autoencoder, "") - expected.astype(int)).max() <= 1
    out = tmp_path / "out.npz"
    command = ["sample", str(run), "--per-class", "1", "--num-steps", "2", "--weights", weights, "--out", str(out)]
    assert cli(command) == 0
    options = SampleOptions(per_class=1, num_steps=2, weights=weights)
    (drawn,) = sample_images(loaded, options, WORLD)
    assert np.array_equal(Samples.load(out).images, drawn.images)


def test_the_autoencoder_leaves_the_run_as_a_folder_that_shards_are_built_with(run, array_file, tmp_path):
    own = load_run(run).autoencoder
    own.save(tmp_path / "tuned")
    read = load_autoencoder(f"diffusers:{tmp_path / 'tuned'}")
    assert (read.scale, read.shift) == (own.scale, own.shift)
    shards = build(array_file, tmp_path / "shards", autoencoder=f"diffusers:{tmp_path / 'tuned'}")
    assert np.allclose(shards.info.scale, own.scale)
    latents = to_model_space(everything(tmp_path / "shards")["moments"][:, 0], shards.info)
    images = everything(tmp_path / "shards", ("image",))["image"].float() / 127.5 - 1
    assert_close(latents, to_model_space(own.encode(images)[0], own), 2e-3)


def test_a_report_shows_the_model_latents_of_its_own_autoencoder(run, monkeypatch):
    loaded, seen = load_run(run), []
    monkeypatch.setattr(
        loaded.autoencoder, "encode", lambda images: seen.append(images) or (torch.zeros(6, 12, 4, 4),) * 2
    )
    study_blocks(loaded, Inputs(loaded.dataset(), 6, 6, 6))
    assert seen[0].shape == (6, 3, 16, 16)
    assert -1 <= seen[0].min() < -0.9


def test_compiled_blocks_give_the_same_loss_and_gradients(vae):
    found = []
    for compiled in (False, True):
        loss = training(vae)
        for network in (loss.model, *loss.methods[0].teachers) if compiled else ():
            for block in network.blocks:
                block.compile(backend="eager")
        value, _ = loss(batch(), 0)
        value.backward()
        found.append([value, *(x.grad for x in loss.model.parameters() if x.grad is not None)])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, 1e-4)


@pytest.mark.parametrize(
    ("changes", "facts", "message"),
    [
        ({"perceptual_weight": 1.0}, {}, "perceptual_weight needs the weights of LPIPS.*or the weight to 0"),
        ({"discriminator_layers": 3}, {}, "discriminator_layers=3 needs images of at least 24 pixels.*set it to 2"),
        ({}, {"autoencoder": "pca:x"}, "the data set's autoencoder is 'pca:x', which cannot be trained"),
        ({}, {"autoencoder": ""}, "the data set's autoencoder is '', which cannot be trained"),
        ({"vae": "diffusers:/nowhere"}, {}, "/nowhere/config.json: missing"),
        ({"vae": "TOY"}, {}, r"makes latents \[12, 4, 4\] of images of 16 pixels, and the model denoises \[2, 8, 8\]"),
        ({"statistics": "STATE"}, {}, "holds no 'latents_scale' of 2 numbers"),
        ({"discriminator": "STATE"}, {}, "is not as in a PatchGAN of width 4 and 1 layers"),
        ({"stop_step": 3}, {}, "stop_step=3: the model denoises what this method makes"),
        ({"encoder_depth": 9}, {}, "methods.repa_e.encoder_depth=9 is not one of"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_the_first_step(vae, changes, facts, message, tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "state.pt")
    places = {"TOY": f"diffusers:{toy_vae()}", "STATE": str(tmp_path / "state.pt")}
    config = REPAE.Config(**{**SMALL, **{key: places.get(value, value) for key, value in changes.items()}})
    with pytest.raises(UserError, match=message) as caught:
        build_methods([config], tiny_sit(in_channels=2, num_classes=5), info(vae, **facts))
    assert "\n" not in str(caught.value)


def test_stage_3_and_shards_without_images_are_refused(token_shards, shards, tmp_path, capsys, monkeypatch):
    with pytest.raises(UserError, match=r"engine\.zero_stage=3 cannot run 'repa_e'"):
        check_stage(EngineConfig(zero_stage=3), [REPAE])
    assert main(arguments(shards, tmp_path / "run", *settings(("repa_e",), 2), "methods.repa_e.fields=image")) == 2
    assert "no field 'image' in the shards" in capsys.readouterr().err


@pytest.mark.launch
def test_two_ranks_train_as_one_process_with_their_micro_batches_together(token_shards, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    start = [
        *settings(("repa_e",), 3),
        "run.checkpoint_every=3",
        "methods.repa_e.vae_lr=1e-3",
        "engine.zero_stage=2",
    ]
    assert main(arguments(token_shards, alone, *start, "engine.micro_batch=4")) == 0
    with Ranks(arguments(token_shards, shared, *start, "engine.micro_batch=2"), tmp_path / "log.txt") as ranks:
        assert ranks.wait() == [0, 0], ranks.text()[-3000:]
    for ours, theirs in zip(rows(shared), rows(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    ours, theirs = tensors(shared, 3), tensors(alone, 3)
    for name in ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"):
        assert_close(ours[f"model/{name}"].double(), theirs[f"model/{name}"].double(), 1e-4)
