"""What `dit-fast export RUN FOLDER` writes, as diffusers reads it."""

import json

import numpy as np
import pytest
import torch

from dit_fast import autoencoders
from dit_fast.autoencoders.pixels import decode_images, from_model_space, to_uint8
from dit_fast.checkpoint import load_official
from dit_fast.checkpoint.run import LoadedRun
from dit_fast.cli import main
from dit_fast.data import open_dataset
from dit_fast.diffusion import initial_noise, sample
from dit_fast.errors import UserError
from dit_fast.exchange.folder import write_folder
from dit_fast.models import new_model
from dit_fast.recipes import load
from dit_fast.sampling.images import sample_images
from dit_fast.sampling.options import SampleOptions
from dit_fast.world import single
from tests.helpers.shard_sets import build
from tests.helpers.tiny_vae import save_vae

diffusers = pytest.importorskip("diffusers")
TINY = ("model.hidden_size=32", "model.depth=2", "model.num_heads=4")


@pytest.fixture(autouse=True)
def _modules(monkeypatch, tmp_path):
    """Where diffusers copies code that came with a folder."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(scope="module")
def dataset(array_file, tmp_path_factory):
    """Latents [4, 8, 8] of a small AutoencoderKL."""
    folder = tmp_path_factory.mktemp("vae")
    save_vae(folder / "vae", channels=4, levels=2, scaling_factor=0.5)
    return build(array_file, folder / "shards", autoencoder=f"diffusers:{folder / 'vae'}")


def made_up(recipe, dataset, *more):
    """A run with random weights in every part."""
    data = dataset.info
    sizes = [f"model.input_size={data.size}", f"model.in_channels={data.channels}"]
    config = load(recipe, [f"data.path={dataset.root}", *sizes, *TINY, *more])
    torch.manual_seed(0)
    model = new_model(config.model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return LoadedRun(model.eval(), config, {"step": 7})


def loaded(folder, **more):
    return diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **more)


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("quickstart", ()),
        ("quickstart-reg", ("model.class_token=16",)),
        ("quickstart-mean_flow", ()),
        ("quickstart-improved_mean_flow", ()),
        ("quickstart-dit", ("model.skip_wiring=input",)),
        ("quickstart-ddt", ("model.encoder_depth=1",)),
        ("quickstart-lightningdit", ()),
    ],
)
def test_every_kind_of_run_gives_the_same_images(recipe, more, dataset, tmp_path):
    run = made_up(recipe, dataset, "model.num_classes=3", *more)
    options = SampleOptions(per_class=1, seed=3, chunk=3)
    assert write_folder(run, tmp_path, tmp_path / "out", dataset, options) == "DitFastPipeline"
    (ours,) = sample_images(run, options, single(), dataset)
    pipe = loaded(tmp_path / "out", custom_pipeline=str(tmp_path / "out"))
    images = pipe(ours.labels.tolist(), seed=3, output_type="np").images
    (latents,) = sample_images(run, options, single(), dataset, latents=True)
    exported = pipe(ours.labels.tolist(), seed=3, output_type="latent").images
    np.testing.assert_allclose(from_model_space(exported, dataset.info), latents.images, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(images, ours.images / 255, atol=1 / 255 + 1e-6)  # decoded in a batch of another size
    later = pipe(ours.labels[1:].tolist(), seed=3, first=1, output_type="np").images
    np.testing.assert_allclose(later, images[1:], atol=1 / 255 + 1e-6)  # in a batch of another size
    drawn = [pipe([0], generator=torch.Generator().manual_seed(k), output_type="pt").images for k in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_dit_is_what_diffusers_own_pipeline_draws(dataset, tmp_path):
    run = made_up("quickstart-dit", dataset, "model.num_classes=1000")
    assert write_folder(run, tmp_path, tmp_path / "out", dataset, SampleOptions(classes=(0,))) == "DiTPipeline"
    pipe = diffusers.DiTPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 5, 1000])
    with torch.no_grad():
        torch.testing.assert_close(pipe.transformer(x, t, y).sample, run.model(x, t, y), rtol=1e-4, atol=1e-4)
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        labels = torch.tensor([1, 2])
        ours = sample(
            run.model, noise, labels, sampler="ddim", num_steps=1000, cfg_scale=1.5, cfg_channels="all",
            field=run.objective.field,
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)  # all 1000 steps: the two space fewer differently
    theirs = pipe([1, 2], guidance_scale=1.5, num_inference_steps=1000, generator=generator, output_type="np").images
    pictures = decode_images(ours, dataset.info, autoencoders.of(dataset), "test")
    np.testing.assert_allclose(theirs, pictures / 255, atol=0.5 / 255 + 1e-4)  # ours are rounded to whole levels


def test_a_run_is_exported_by_one_command(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(place / "diverse"), str(out)]) == 0
    assert capsys.readouterr().out == f"{out} (DitFastPipeline)\n"
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "not diffusers' DiTPipeline: the model is a SiT" in card
    assert "No metric of these weights was measured." in card
    index = json.loads((out / "model_index.json").read_text())
    assert str(place) not in json.dumps(index) + (out / "transformer" / "config.json").read_text()
    pipe = loaded(out, custom_pipeline=str(out))
    assert pipe([0, 1], seed=0).images[0].size == (32, 32)
    with pytest.raises(UserError, match="give generator or seed, not both"):
        pipe([0], seed=0, generator=torch.Generator())
    assert main(["export", str(place / "diverse"), str(out)]) == 2
    assert "exists already; name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "out", "named"),
    [
        (
            "diverse",
            "my-model-v1.0",
            "my-model-v1.0: a file's name must end in .pt or .safetensors, and a folder's has no",
        ),
        (
            "diverse/checkpoints",
            "new",
            "checkpoints: holds checkpoints, and is no run itself; give one of them, or the run",
        ),
        (
            "diverse/config.json",
            "new",
            "config.json: is a file, not the folder of a run; from one of published weights",
        ),
    ],
)
def test_a_slip_in_run_or_out_is_named(place, tmp_path, run, out, named, capsys):
    assert main(["export", str(place / run), str(tmp_path / out)]) == 2
    assert named in capsys.readouterr().err


def test_a_file_says_what_it_is(place, tmp_path, capsys):
    from safetensors import safe_open

    out = tmp_path / "new" / "model.safetensors"
    assert main(["export", str(place / "plain"), str(out), "--family", "repa"]) == 0
    with safe_open(out, "pt") as file:
        about = file.metadata()
    assert about["dit_fast.methods"] == "none"
    assert about["dit_fast.objective"] == "flow"
    assert int(about["dit_fast.step"]) > 0
    assert about["num_classes"] == "3"
    assert main(["sample", str(out)]) == 2
    assert "is a file, not the folder of a run; from one of published weights draw in Python, by load_official" in (
        capsys.readouterr().err
    )
    # what the message names
    model, index = load_official(out, family="repa"), torch.arange(2)
    noise = initial_noise(0, index, model.shapes["image"])
    latents = sample(model, noise, torch.tensor([0, 2]), num_steps=2, cfg_scale=1.8, seed=0, index=index)
    with torch.no_grad():
        pixels = autoencoders.of(open_dataset(place / "shards")).decode(latents.float() / 0.5)
    assert to_uint8(pixels.numpy(), "model.safetensors", 0).shape == (2, 32, 32, 3)
    before = out.read_bytes()
    assert main(["export", str(place / "plain"), str(out)]) == 2
    assert "model.safetensors: exists already; name a new file" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main(["export", str(place / "plain"), str(tmp_path / "folder"), "--family", "repa"]) == 2
    assert "--family is for a file" in capsys.readouterr().err
