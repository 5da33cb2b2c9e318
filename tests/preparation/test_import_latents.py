"""Latents that others have made, each written here by the library of its format, as shards."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dit_fast.cli import main
from dit_fast.data.dataset import open_dataset
from dit_fast.errors import ConfigError, DataError
from dit_fast.preparation.import_latents import import_latents
from tests.helpers.shard_sets import everything, make_tree

COUNT, CHANNELS, SIDE = 11, 3, 4
RNG = np.random.default_rng(0)
LATENTS = RNG.normal(1, 3, (COUNT, CHANNELS, SIDE, SIDE)).astype(np.float32)
LABELS = np.array([0, 1, 2, 1, 0, 2, 2, 1, 0, 1, 2])
OPTIONS = {"dtype": "float32", "samples_per_shard": 4, "progress": False}


def same(folder, latents=LATENTS, labels=LABELS):
    batch = everything(folder)
    np.testing.assert_allclose(batch["moments"].numpy()[:, 0], latents, rtol=1e-6, atol=1e-6)
    assert batch["label"].tolist() == list(labels)
    return batch["moments"].numpy()


@pytest.fixture
def lightning(tmp_path):
    """As LightningDiT's extract_features.py leaves them."""
    folder = tmp_path / "lightning"
    folder.mkdir()
    for part, rows in enumerate((slice(0, 6), slice(6, None))):
        latents = torch.from_numpy(LATENTS[rows])
        save_file(
            {
                "latents": latents,
                "latents_flip": latents.flip(-1).contiguous(),
                "labels": torch.from_numpy(LABELS[rows]),
            },
            folder / f"latents_rank00_shard{part:03d}.safetensors",
        )
    mean, std = LATENTS.mean((0, 2, 3), keepdims=True), LATENTS.std((0, 2, 3), keepdims=True)
    torch.save({"mean": torch.from_numpy(mean), "std": torch.from_numpy(std)}, folder / "latents_stats.pt")
    return folder


@pytest.fixture
def tars(tmp_path):
    """As webdataset's writer leaves them."""
    webdataset = pytest.importorskip("webdataset")
    folder = tmp_path / "tars"
    folder.mkdir()
    for part, rows in enumerate((range(0, 6), range(6, COUNT))):
        with webdataset.TarWriter(str(folder / f"{part:05d}.tar")) as writer:
            for k in rows:
                writer.write({"__key__": f"a/{k:06d}", "npy": LATENTS[k], "cls": int(LABELS[k])})
    return folder


def test_safetensors_of_lightningdit(lightning, tmp_path):
    dataset = import_latents(lightning, tmp_path / "out", processes=2, **OPTIONS)
    same(tmp_path / "out")
    assert (dataset.info.num_classes, dataset.info.std) == (3, False)
    mean, std = LATENTS.mean((0, 2, 3)), LATENTS.std((0, 2, 3))
    np.testing.assert_allclose(dataset.info.scale, 1 / std, rtol=1e-6)  # its loader: (z - mean) / std
    np.testing.assert_allclose(dataset.info.shift, -mean / std, rtol=1e-5)
    import_latents(lightning, tmp_path / "scaled", scaled=True, **OPTIONS)
    same(tmp_path / "scaled", LATENTS * std[:, None, None] + mean[:, None, None])
    (lightning / "latents_stats.pt").unlink()
    standardised = import_latents(lightning, tmp_path / "own", **OPTIONS)
    np.testing.assert_allclose(standardised.info.scale, 1 / std, rtol=1e-4)


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_data_sets_of_hugging_face(kind, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({
        "latent": datasets.Array3D((CHANNELS, SIDE, SIDE), "float32"),
        "label": datasets.ClassLabel(names=["ant", "bee", "cat"]),
    })  # fmt: skip
    made = datasets.Dataset.from_dict({"latent": LATENTS, "label": LABELS}, features=features)
    if kind == "arrow":
        made.save_to_disk(tmp_path / "src", num_shards=2)
    else:
        (tmp_path / "src" / "data").mkdir(parents=True)
        made.to_parquet(tmp_path / "src" / "data" / "train-00000-of-00001.parquet", batch_size=5)
    dataset = import_latents(tmp_path / "src", tmp_path / "out", scale=0.5, scaled=True, processes=2, **OPTIONS)
    same(tmp_path / "out", LATENTS / 0.5)
    assert (dataset.info.class_names, dataset.info.scale) == (("ant", "bee", "cat"), 0.5)
    with pytest.raises(ConfigError, match=r"has no 'z' for --latents; there are label, latent"):
        import_latents(tmp_path / "src", tmp_path / "other", latents="z", **OPTIONS)


def test_arrow_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").touch()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"need pyarrow; run `pip install 'dit_fast\[import\]'`"):
        import_latents(tmp_path, tmp_path / "out", **OPTIONS)


def test_webdataset_tars(tars, tmp_path):
    import_latents(tars, tmp_path / "out", processes=2, **OPTIONS)
    same(tmp_path / "out")


def test_both_moments(tmp_path):
    folder = tmp_path / "src"
    folder.mkdir()
    moments = np.concatenate([LATENTS, RNG.normal(size=LATENTS.shape)], 1).astype(np.float32)
    save_file({"latents": torch.from_numpy(moments), "labels": torch.from_numpy(LABELS)}, folder / "a.safetensors")
    dataset = import_latents(folder, tmp_path / "out", form="mean-logvar", scale=2.0, scaled=True, **OPTIONS)
    assert dataset.info.std
    found = same(tmp_path / "out", LATENTS / 2)
    np.testing.assert_allclose(found[:, 1], np.exp(moments[:, CHANNELS:] / 2) / 2, rtol=1e-5)
    with pytest.raises(DataError, match=r"a\.safetensors, row \d+: negative standard deviations; is it --form mean"):
        import_latents(folder, tmp_path / "other", form="mean-std", **OPTIONS)


def test_what_does_not_fit_is_named(lightning, tars, tmp_path):
    def refused(source, message, **more):
        with pytest.raises((DataError, ConfigError), match=message) as caught:
            import_latents(source, tmp_path / "out", **{**OPTIONS, **more})
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none", "is no folder")
    refused(tmp_path, "holds no latents that are known")
    refused(tars, "--scaled needs --scale", scaled=True)
    refused(tars, "--shift needs --scale", shift=1.0)
    refused(tars, "has label 2, outside 0..1", num_classes=2)
    damaged = lightning / "latents_rank00_shard001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    refused(lightning, r"shard001\.safetensors: cannot be read")
    with tarfile.open(tars / "00002.tar", "w") as archive:
        content = io.BytesIO()
        np.save(content, LATENTS[0, :, :2])
        for name, data in (("z.npy", content.getvalue()), ("z.cls", b"1")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    refused(tars, r"00002\.tar, sample 'z': float32 \(3, 2, 4\), expected floats \[C, h, h\]")
    (tars / "00002.tar").unlink()
    with tarfile.open(tars / "00002.tar", "w") as archive:
        for name, data in (("z.npy", b""), ("z.json", b'{"label": true}')):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    refused(tars, r"sample 'z': no label in 'z\.json' \(not a whole number\)")
    (tars / "00002.tar").unlink()
    with tarfile.open(tars / "00002.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("z.npy"))
    refused(tars, r"sample 'z': which of npy holds the labels\? name it with --labels")


@pytest.mark.parametrize(
    ("latents", "labels", "message"),
    [
        (torch.zeros(3, 4, 2, 2, dtype=torch.uint8), torch.arange(3), r"row 0: uint8 \(4, 2, 2\), expected floats"),
        (torch.zeros(3, 4, 2, 2), torch.arange(3) + 0.5, r"labels float32 \(3,\); one whole number each is needed"),
        (torch.zeros(3, 4, 2, 2), torch.arange(3) > 1, r"labels bool \(3,\)"),
    ],
)
def test_other_types_are_not_taken_for_latents_and_labels(tmp_path, latents, labels, message):
    (tmp_path / "in").mkdir()
    save_file({"latents": latents, "labels": labels}, tmp_path / "in" / "a.safetensors")
    with pytest.raises(DataError, match=message):
        import_latents(tmp_path / "in", tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_splits_are_not_mixed(tmp_path):
    for name in ("train-00000-of-00001", "validation-00000-of-00001"):
        (tmp_path / f"{name}.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds several splits \(train, validation\)"):
        import_latents(tmp_path, tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize("files", [[], [{"filename": "/etc/passwd"}], [{"filename": "../a.arrow"}]])
def test_arrow_is_read_in_its_own_folder_alone(tmp_path, files):
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": files}))
    with pytest.raises(DataError, match=r"state\.json: cannot be read \(it must list files of its own folder\)"):
        import_latents(tmp_path, tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize("latents", [[[[1, 2], [3, 4]]], [[["1.5", "2"], ["3", "4"]]]])
def test_columns_of_other_types_are_not_taken_for_latents(tmp_path, latents):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.table({"latents": [latents] * 2, "label": [0, 1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 0: (int64|<U3) \(1, 2, 2\), expected floats"):
        import_latents(tmp_path, tmp_path / "out", **OPTIONS)


def test_pickles_are_not_read(lightning, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"mean": Evil(), "std": Evil()}, lightning / "latents_stats.pt")
    with pytest.raises(DataError, match=r"latents_stats\.pt: cannot be read"):
        import_latents(lightning, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "ran").exists()


def test_one_command_for_all(lightning, tmp_path, capsys):
    assert main(["import", str(lightning), str(tmp_path / "out"), "--no-progress"]) == 0
    shown = capsys.readouterr()
    assert "11 samples, 3 classes" in shown.out
    assert shown.err == "not imported: latents_flip\n"
    make_tree(tmp_path / "vae-sd")
    assert (
        main(["import", str(tmp_path / "vae-sd"), str(tmp_path / "tree"), "--no-progress", "--num-classes", "5"]) == 0
    )
    assert open_dataset(tmp_path / "tree").info.scale == 0.18215
    assert main(["import", str(tmp_path / "vae-sd"), str(tmp_path / "x"), "--form", "mean-std"]) == 2
    assert "--form is not for a vae-sd tree" in capsys.readouterr().err
    assert json.loads((tmp_path / "tree" / "dataset.json").read_text())["settings"]["imported"] == "vae-sd"
