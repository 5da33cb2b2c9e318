import shutil

import numpy as np
import pytest
from shard_sets import CLASSES, build, make_images


@pytest.fixture(scope="session")
def array_file(tmp_path_factory):
    images, labels = make_images()
    path = tmp_path_factory.mktemp("source") / "pictures.npz"
    np.savez(path, images=images, labels=labels, class_names=np.array(CLASSES))
    return path


@pytest.fixture(scope="session")
def built(array_file, tmp_path_factory):
    """A finished data set; tests that damage it work on a copy."""
    out = tmp_path_factory.mktemp("built") / "shards"
    build(array_file, out)
    return out


@pytest.fixture
def copied(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy")
