"""`dit-fast evaluate`: numbers with their protocol, the same for any batch, number of ranks and number of kills."""

import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast.cli import main
from dit_fast.encoders import load_encoder
from dit_fast.evaluation import evaluate as evaluate_module
from dit_fast.evaluation import features as features_module
from dit_fast.evaluation import networks
from dit_fast.evaluation.command import sweep
from dit_fast.evaluation.metrics import frechet_distance, inception_score, moments, precision_recall
from dit_fast.evaluation.records import FILE_NAME, read_evaluations
from tests.helpers.encoder_weights import toy_encoder
from tests.helpers.no_gpu import no_gpu  # noqa: F401
from tests.helpers.toy_runs import environment

METRICS = ["FD-DINOv2-B", "KD-DINOv2-B", "precision-DINOv2-B", "recall-DINOv2-B"]
DRAWN = ["--num-steps", "1", "--count", "24", "--batch", "8", "--cfg-scale", "1"]


@pytest.fixture(autouse=True)
def _private(tmp_path, monkeypatch):
    """Features of references, beside what all tests share, are each test's own."""
    monkeypatch.setattr(features_module, "beside", lambda place: tmp_path / "kept")


@pytest.fixture
def run(place, tmp_path):
    return shutil.copytree(place / "plain", tmp_path / "run")


@pytest.fixture
def network():
    return ["--network", f"dinov2-vit-b:{toy_encoder()}"]


def the_only(folder):
    (found,) = read_evaluations(folder)
    return found


def test_a_run_is_measured_with_its_protocol(run, network, capsys):
    assert main(["evaluate", str(run), *network, *DRAWN]) == 0
    found, printed = the_only(run), capsys.readouterr().out
    assert list(found.values) == METRICS
    assert found.step == 4
    protocol = found.protocol
    assert (protocol.count, protocol.size, protocol.reference_count) == (24, "32x32", 36)
    assert (protocol.labels, protocol.num_steps, protocol.nfe, protocol.guidance) == ("balanced", 1, 1, 1.0)
    assert protocol.resizing == "bicubic, antialiased, to 224"
    assert protocol.weights.startswith("ema 0.")
    assert protocol.decoder.startswith("pca:")
    assert protocol.text() in printed
    assert not list((run / "evaluation" / "parts").iterdir())
    # weights as they are, and both branches of the guidance in one evaluation
    more = ["--weights", "model", "--sampler", "heun", "--num-steps", "2", "--cfg-scale", "2"]
    assert main(["evaluate", str(run), *network, *DRAWN, *more]) == 0
    assert [each.protocol.nfe for each in read_evaluations(run)] == [1, 3]
    assert read_evaluations(run)[1].protocol.weights == "raw"


def test_the_protocol_tells_seeds_and_chosen_classes_apart(run, network, capsys):
    few = [*network, "--num-steps", "1", "--count", "8", "--batch", "8", "--cfg-scale", "1"]
    for more in ([], ["--seed", "1"], ["--classes", "2,0"]):
        assert main(["evaluate", str(run), *few, *more]) == 0
    assert "8 images of 32x32, balanced labels of 2 classes alone (2, 0), " in capsys.readouterr().out
    first, again, chosen = (each.protocol for each in read_evaluations(run))
    assert first != again == replace(first, seed=1)  # `compare` takes draws of other seeds together
    assert chosen == replace(first, classes=(2, 0))


def test_a_reference_of_another_size_is_told(network, tmp_path, capsys):
    pytest.importorskip("efficientnet_lite_pytorch")
    rng = np.random.default_rng(0)
    for name, side in (("ours", 32), ("theirs", 96)):
        np.savez(tmp_path / name, arr_0=rng.integers(0, 256, (8, side, side, 3), dtype=np.uint8))
    asked = ["--reference", str(tmp_path / "theirs.npz"), "--network", "efficientnet-lite0"]
    for _ in range(2):  # with features that are computed, and that are kept
        assert main(["evaluate", str(tmp_path / "ours.npz"), *asked]) == 0
        printed = capsys.readouterr().out
        assert "reference theirs.npz (8 images of 96x96)" in printed
        assert "to 64 (the reference: not resized)" in printed


def test_batches_chunks_and_ranks_change_nothing(run, network, place, tmp_path, monkeypatch):
    reference = ["--reference", str(place / "shards")]
    images = ["evaluate", str(place / "toy.npz")]
    with np.load(place / "toy.npz") as file:
        np.savez(tmp_path / "arr.npz", arr_0=file["images"][::2])
    images[1] = str(tmp_path / "arr.npz")
    found = []
    for batch, chunk, ranks in ((64, 256, 1), (5, 256, 1), (64, 7, 1), (64, 7, 2)):
        monkeypatch.setattr(networks, "BATCH", batch)
        monkeypatch.setattr(networks.in_batches, "__defaults__", (batch,))
        for module in (features_module, evaluate_module):
            monkeypatch.setattr(module, "CHUNK", chunk)
        out = tmp_path / f"{batch}-{chunk}-{ranks}"
        for rank in reversed(range(ranks)):
            place_of = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": 1,
            }
            for name, value in place_of.items() if ranks > 1 else ():
                monkeypatch.setenv(name, str(value))
            monkeypatch.setattr("dit_fast.world.meet", lambda: None)
            assert main([*images, *network, *reference, "-o", str(out)]) == 0
        found.append(the_only(out).values)
    for name in METRICS:
        assert [each[name] for each in found] == pytest.approx([found[0][name]] * 4, rel=1e-6)
    assert found[2] == found[3]  # ranks change no bit


def test_a_killed_evaluation_goes_on(run, network, monkeypatch):
    real, measured = networks.in_batches, []

    def killed_at(count):
        def batches(*arguments, **options):
            if len(measured) == count:
                raise KeyboardInterrupt
            measured.append(count)
            return real(*arguments, **options)

        for module in (features_module, evaluate_module):
            monkeypatch.setattr(module, "in_batches", batches)

    killed_at(2)  # the reference, and one chunk of three
    command = ["evaluate", str(run), *network, *DRAWN]
    assert main(command) == 130
    killed_at(None)
    assert main(command) == 0
    assert len(measured) == 4
    killed = the_only(run).values
    (run / FILE_NAME).unlink()
    assert main(command) == 0
    assert the_only(run).values == killed
    assert len(measured) == 4 + 3  # the reference's features are kept


@pytest.mark.parametrize("form", ["folder", "tar", "npz"])
def test_images_of_files_are_those_of_the_run(run, network, place, tmp_path, form):
    drawn = tmp_path / {"folder": "drawn", "tar": "drawn.tar", "npz": "drawn.npz"}[form]
    assert main(["sample", str(run), *DRAWN, "-o", str(drawn)]) == 0
    assert main(["evaluate", str(run), *network, *DRAWN]) == 0
    assert main(["evaluate", str(drawn), *network, "--reference", str(place / "shards")]) == 0
    of_run, of_files = the_only(run), the_only(tmp_path)
    for name in METRICS:
        # differences of kernels near 1, of float32 features that other batches round to other bits
        assert of_files.values[name] == pytest.approx(of_run.values[name], rel=1e-5)
    assert of_files.protocol.samples == drawn.name
    assert "drawn in an unstated way" in of_files.protocol.text()


def test_a_reference_is_measured_once_for_all_runs(place, network, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    shards, real, seen = shutil.copytree(place / "shards", tmp_path / "shards"), networks.in_batches, []
    monkeypatch.setattr(features_module, "in_batches", lambda *given: seen.append(len(given[1])) or real(*given))
    for name in ("plain", "diverse"):
        shutil.copytree(place / name, tmp_path / name)
        assert main(["evaluate", str(tmp_path / name), *network, *DRAWN, "--data", str(shards)]) == 0
    assert seen == [36]
    (kept,) = (tmp_path / "shards.features").iterdir()
    command = ["evaluate", str(tmp_path / "plain"), *network, *DRAWN, "--data", str(shards)]
    assert main([*command, "--reference-count", "30"]) == 0
    assert seen == [36, 30]  # another number of images is another reference
    with np.load(kept) as file:
        content = dict(file)
    np.savez(kept, **{**content, "mu": content["mu"] + 1e-3})
    assert main(command) == 2
    assert f"{kept}: holds no whole statistics" in capsys.readouterr().err
    # where nothing can be written beside it, the run has them
    shutil.rmtree(tmp_path / "shards.features")
    (tmp_path / "shards.features").touch()
    assert main(command) == 0
    assert [path.name for path in (tmp_path / "plain" / "evaluation").glob("reference_*")] == [kept.name]
    assert seen == [36, 30, 36]


def test_a_second_command_at_the_same_place_is_refused(run, network, tmp_path, capsys):
    command = ["evaluate", str(run), *network, *DRAWN, "--metrics", "fd"]
    (run / "evaluation").mkdir()
    (run / "evaluation" / "lock").touch()
    script = "import sys; from pathlib import Path; from dit_fast.files import locked\n"
    script += "held = locked(Path(sys.argv[1]), 0); print('held', flush=True); sys.stdin.read()"
    other = [sys.executable, "-c", script, str(run / "evaluation" / "lock")]
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert main(command) == 2
        assert f"{run}: another `dit-fast evaluate` writes there; wait for it" in capsys.readouterr().err
        assert not (run / FILE_NAME).exists()
        assert main([*command, "-o", str(tmp_path / "elsewhere")]) == 0
        holder.stdin.close()
    assert main(command) == 0


def test_a_sweep_of_the_guidance_tells_the_best(run, network, capsys):
    assert main(["evaluate", str(run), *network, *DRAWN[:-2], "--cfg-scale", "1:2:0.5", "--metrics", "fd"]) == 0
    rows = read_evaluations(run)
    assert [each.protocol.guidance for each in rows] == [1.0, 1.5, 2.0]
    top = min(rows, key=lambda each: each.values["FD-DINOv2-B"])
    assert (
        f"best FD-DINOv2-B {top.values['FD-DINOv2-B']:.6g} at guidance {top.protocol.guidance:g}"
        in capsys.readouterr().out
    )
    assert sweep("1:3:0.1") == [float(f"{x / 10:.1f}") for x in range(10, 31)]
    assert sweep(None) == [None]


def test_several_networks_measure_the_same_images(run, network, capsys):
    second = ["--network", f"dinov2-vit-b:{toy_encoder()}"]
    assert main(["evaluate", str(run), *network, *second, *DRAWN]) == 2
    assert "given twice" in capsys.readouterr().err
    pytest.importorskip("efficientnet_lite_pytorch")
    assert main(["evaluate", str(run), *network, "--network", networks.PACKAGED, *DRAWN, "--metrics", "fd"]) == 0
    assert [list(each.values) for each in read_evaluations(run)] == [["FD-DINOv2-B"], ["FD-EffLite0"]]


def test_without_inception_the_command_says_so(run, caplog):
    pytest.importorskip("efficientnet_lite_pytorch")
    assert main(["evaluate", str(run), *DRAWN, "--metrics", "fd"]) == 0
    assert list(the_only(run).values) == ["FD-EffLite0"]
    assert "there is no FID" in caplog.text


def test_the_step_at_which_a_curve_reached_a_value(run, network, capsys):
    for step in (2, 4):
        assert (
            main(["evaluate", str(run / "checkpoints" / f"step_{step:08d}"), *network, *DRAWN, "--metrics", "fd"]) == 0
        )
    early, late = (each.values["FD-DINOv2-B"] for each in read_evaluations(run))
    capsys.readouterr()
    assert main(["evaluate", str(run), "--reach", f"FD-DINOv2-B={(early + late) / 2}"]) == 0
    assert ("at step 3" if late < early else "at step 2") in capsys.readouterr().out
    assert main(["evaluate", str(run), "--reach", "FID=3"]) == 2
    assert "holds no FID (FD-DINOv2-B was measured)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--metrics", "fid"], "unknown metric 'fid'; valid: fd"),
        (["--metrics", "is"], "'is' is of the Inception network"),
        (["--network", "adm"], "adm needs Inception's weights"),
        (["--network", "adm:absent.pb"], "absent.pb: no such file"),
        (["--network", "vgg"], "network 'vgg': unknown encoder 'vgg'"),
        (["--network", "inception"], "other networks: adm:FILE, torch-fidelity:FILE"),
        (["--cfg-scale", "3:1:1"], "must ascend"),
        (["--cfg-scale", "a"], "FIRST:LAST:STEP"),
        (["--reference", "absent"], "absent: no such file or folder"),
        (["--reference-count", "1"], "ask for 2 to 36"),
        (["--reach", "FID"], "expected METRIC=VALUE"),
        (["--labels", "odd"], "unknown labels 'odd'"),
    ],
)
def test_wrong_options_are_one_line(run, network, capsys, changes, message):
    assert main(["evaluate", str(run), *([] if "--network" in changes else network), *DRAWN, *changes]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert message in line
    assert not (run / FILE_NAME).exists()


def test_images_need_a_reference_and_take_no_options_of_drawing(place, network, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    assert main(["evaluate", str(tmp_path / "a.npz"), *network]) == 2
    assert "name one with --reference" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "a.npz"), *network, "--seed", "1"]) == 2
    assert "--seed is for drawing" in capsys.readouterr().err


def test_a_file_of_statistics_is_a_reference_of_its_own_network(run, network, place, tmp_path, capsys, caplog):
    command = ["evaluate", str(run), *network, *DRAWN]
    assert main(command) == 0
    (kept,) = (tmp_path / "kept").glob("reference_*.npz")
    moved = shutil.copy(kept, tmp_path / "ours.npz")
    assert main([*command, "--reference", str(moved)]) == 0
    first, second = read_evaluations(run)
    assert first.values == second.values
    with np.load(kept) as file:
        np.savez(tmp_path / "bare.npz", mu=file["mu"], sigma=file["sigma"])
        np.savez(tmp_path / "other.npz", mu=file["mu"], sigma=file["sigma"], network="adm:12")
    assert main([*command, "--reference", str(tmp_path / "bare.npz")]) == 0
    assert list(read_evaluations(run)[-1].values) == METRICS[:1]
    assert read_evaluations(run)[-1].protocol.reference_count is None
    assert "no kd: the reference bare.npz holds no images" in caplog.text
    assert main([*command, "--reference", str(tmp_path / "bare.npz"), "--metrics", "pr"]) == 2
    assert main([*command, "--reference", str(tmp_path / "other.npz")]) == 2
    assert "is of adm:12, not of dinov2-vit-b" in capsys.readouterr().err


def test_damaged_images_are_named(place, network, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8 + i // 2, 3), i, np.uint8)).save(folder / f"{i}.png")
    reference = ["--reference", str(place / "shards")]
    assert main(["evaluate", str(folder), *network, *reference]) == 2
    assert "2.png: is (8, 9), the first image (8, 8)" in capsys.readouterr().err
    (folder / "2.png").write_bytes(b"no image")
    assert main(["evaluate", str(folder), *network, *reference]) == 2
    assert "2.png: not a readable image" in capsys.readouterr().err
    (folder / "sampling.json").write_text(json.dumps({"options": {}}))
    assert main(["evaluate", str(folder), *network, *reference]) == 2
    assert "is not finished" in capsys.readouterr().err
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    assert main(["evaluate", str(tmp_path / "empty.tar"), *network, *reference]) == 2
    assert "holds no image files" in capsys.readouterr().err
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        archive.add(folder / "0.png", "0.png")
        member = tarfile.TarInfo("1.png")
        member.type, member.linkname = tarfile.LNKTYPE, "0.png"
        archive.addfile(member)
    assert main(["evaluate", str(tmp_path / "links.tar"), *network, *reference]) == 2
    assert "links.tar: '1.png' is a link; pack the images themselves" in capsys.readouterr().err


def test_the_name_of_an_encoder_is_that_of_its_numbers():
    encoder = load_encoder(f"dinov2-vit-b:{toy_encoder()}")
    assert networks.EncoderFeatures("dinov2-vit-b", encoder, "cpu").name == "DINOv2-B"


class Brightness:
    """Stands for the Inception network where its 24 million weights would only take time."""

    name, title, identity, kind = "", "Inception of 2015 (ADM)", "inception:1", "adm"

    def resizing(self, size):
        return "not resized"

    def __call__(self, images):
        x = images.double().mean((1, 2)) / 255
        features = torch.cat([x, x.square()], 1).float()
        return {"pool": features, "spatial": features[:, :4] ** 3, "logits": 9 * features[:, :5]}


def test_adms_reference_gives_the_five_numbers_of_its_evaluator(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "load_network", lambda spec, device: Brightness())
    rng = np.random.default_rng(0)
    made = (rng.integers(0, 90, (n, 6, 6, 3)) * rng.integers(1, 3, (n, 1, 1, 3)) for n in (40, 30))
    samples, pictures = (images.astype(np.uint8) for images in made)
    train = Brightness()(torch.from_numpy(rng.integers(0, 256, (99, 6, 6, 3)).astype(np.uint8)))
    whole = {name: moments(train[name]) for name in ("pool", "spatial")}
    statistics = {"mu": whole["pool"].mean, "sigma": whole["pool"].covariance}
    statistics |= {"mu_s": whole["spatial"].mean, "sigma_s": whole["spatial"].covariance}
    np.savez(tmp_path / "reference.npz", arr_0=pictures, **{name: x.numpy() for name, x in statistics.items()})
    np.savez(tmp_path / "samples.npz", arr_0=samples)
    command = ["evaluate", str(tmp_path / "samples.npz"), "--reference", str(tmp_path / "reference.npz")]
    for _ in range(2):  # the second time with the kept features of arr_0
        assert main([*command, "--network", "adm:any.pb", "-o", str(tmp_path / "out")]) == 0
        found = the_only(tmp_path / "out")
        ours, theirs = Brightness()(torch.from_numpy(samples)), Brightness()(torch.from_numpy(pictures))
        precision, recall = precision_recall(ours["pool"], theirs["pool"])
        assert found.values == pytest.approx(
            {
                "FID": frechet_distance(moments(ours["pool"]), whole["pool"]),
                "sFID": frechet_distance(moments(ours["spatial"]), whole["spatial"]),
                "IS": inception_score(ours["logits"], split=5000),
                "precision": precision,
                "recall": recall,
            },
            rel=1e-9,
        )
        assert found.protocol.reference_count is None
        assert "neighbours in 30 of the reference" in found.protocol.metrics
