"""Importing the published vae-sd tree: every file once, under its own label."""

import json
import shutil

import numpy as np
import pytest

from dit_fast import autoencoders
from dit_fast.errors import ConfigError, DataError
from dit_fast.preparation.vae_sd import import_vae_sd
from tests.helpers.shard_sets import everything, make_tree


def test_importing_the_published_tree(tmp_path):
    arrays, labels = make_tree(tmp_path / "vae-sd")
    options = {"num_classes": 5, "dtype": "float32", "samples_per_shard": 4, "progress": False}
    dataset = import_vae_sd(tmp_path / "vae-sd", tmp_path / "out", **options)
    batch = everything(tmp_path / "out")
    assert np.array_equal(batch["moments"].numpy(), arrays)
    assert batch["label"].tolist() == labels
    assert (dataset.info.scale, dataset.info.num_classes, dataset.info.shard_sizes) == (0.18215, 5, (4, 4, 1))
    with pytest.raises(DataError, match="does not say where its autoencoder lies"):
        autoencoders.of(dataset)
    path = tmp_path / "vae-sd" / "00000" / "img-mean-std-00000000.npy"
    np.save(path, np.load(path) / 2)  # same size
    with pytest.raises(DataError, match=r"begun with other settings \(source: "):
        import_vae_sd(tmp_path / "vae-sd", tmp_path / "out", **options)
    for extra in (
        {"scale": float("nan")},
        {"scale": 0.0},
        {"scale": -1.0},
        {"scale": 1e-50},  # 0 in float32
        {"scale": 1e39},
        {"shift": float("inf")},
        {"shift": -1e39},
        {"num_classes": 10**12},
    ):
        (name,) = extra
        with pytest.raises(ConfigError, match=f"{name}="):
            import_vae_sd(tmp_path / "vae-sd", tmp_path / "other", **{**options, **extra})
        assert not (tmp_path / "other").exists()


def test_bad_trees_are_refused(tmp_path):
    def refused(message):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with pytest.raises(DataError, match=message) as caught:
            import_vae_sd(tree, tmp_path / "out", progress=False)
        assert "\n" not in str(caught.value)

    tree = tmp_path / "tree"
    make_tree(tree)
    third = tree / "00000" / "img-mean-std-00000002.npy"
    good = np.load(third)
    np.save(third, np.concatenate([good[:4], np.log(good[4:] ** 2)]))
    refused("00000002.npy: the second half has negative values, so it is a log variance")
    np.save(third, np.where(np.arange(8)[:, None, None] == 1, np.nan, good))
    refused("00000002.npy: holds NaN")
    third.write_bytes(third.read_bytes().replace(b"(8, 4, 4), }", b"(8,4,40000)}"))
    refused("00000002.npy: not a readable npy array .its header claims")
    np.save(third, good[:, :2])
    refused(r"00000002.npy: float32 \(8, 2, 4\), expected")
    np.save(third, good[:, :2, :2])
    refused(r"00000002.npy: moments \(2, 4, 2, 2\), .* has \(2, 4, 4, 4\)")
    third.write_bytes(b"junk")
    refused("00000002.npy: not a readable npy")
    third.unlink()
    refused("00000002.npy: named in dataset.json but missing")
    np.save(third, good)
    np.save(tree / "00000" / "img-mean-std-00000099.npy", good)
    refused("00000099.npy: not listed in dataset.json")
    (tree / "00000" / "img-mean-std-00000099.npy").unlink()
    content = json.loads((tree / "dataset.json").read_text())
    (tree / "linked").symlink_to("00000")
    name, good_labels = content["labels"][0][0], [list(pair) for pair in content["labels"]]
    content["labels"][0][1] = -1
    (tree / "dataset.json").write_text(json.dumps(content))
    refused(r"dataset.json: .* has label -1, outside 0..")
    for first, second, message in (
        (
            ["linked/img-mean-std-00000001.npy", 1],
            None,
            "names a file twice, as 'linked/.*' and, by a link, '00000/img",
        ),
        (["./00000/img-mean-std-00000001.npy", 1], None, "names a file twice, as './0.*' and '00000/img"),
        (["00000/../00000/img-mean-std-00000001.npy", 1], None, "names a file twice"),
        ([f"{tree}/00000/img-mean-std-00000000.npy", 0], None, "leaves the folder"),
        (["../tree/00000/img-mean-std-00000000.npy", 0], None, "leaves the folder"),
        ([name, 1.7], None, r"1.7\] is not a path and a whole number"),
        ([name, True], None, r"true\] is not a path"),
        ([name, "1"], None, "is not a path and a whole number"),
        ([None, 1], None, "is not a path and a whole number"),
        ([name + "\udcff", 1], None, "not UTF-8"),
        ([name, 1], 2**33, "no image has label 5"),
    ):
        content = {"labels": [first, [good_labels[1][0], good_labels[1][1] if second is None else second]]}
        content["labels"] += good_labels[2:]
        (tree / "dataset.json").write_text(json.dumps(content))
        refused(message)
    (tree / "dataset.json").write_text('{"labels": null}')
    refused("dataset.json: expected")
    (tree / "dataset.json").unlink()
    refused("dataset.json: missing; give the vae-sd folder itself")
