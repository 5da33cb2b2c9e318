"""One thread per test process: results and timings then depend neither on the machine nor on xdist's worker count."""

import functools
import gc
import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts with &
ROOM = 5  # GiB that the runs of a whole session of tests take at once


def pytest_sessionstart(session):
    """A full disk fails hundreds of tests, each by another message."""
    free = shutil.disk_usage(tempfile.gettempdir()).free / 2**30
    if free < ROOM and not hasattr(session.config, "workerinput"):
        pytest.exit(f"{tempfile.gettempdir()} has {free:.1f} GiB free of {ROOM} that the tests need; set TMPDIR", 4)


def pytest_collection_finish():
    """What is imported stays: a tenth of the time of tests went to looking through it for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """The folder of `two_runs.make_two_runs`: shards, diverse, plain; read only, which is checked at the end."""
    from tests.helpers.two_runs import make_two_runs

    folder = make_two_runs(tmp_path_factory.mktemp("two_runs"))
    before = _listed(folder)
    yield folder
    changed = sorted(path for path, _ in before ^ _listed(folder))
    if changed:
        raise RuntimeError(f"a test changed what all share, and should copy it first: {', '.join(changed)}")


def _listed(folder: Path) -> set[tuple[str, int]]:
    return {(str(path.relative_to(folder)), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files that start processes of their own run one test at a time, on one worker, while the others do the rest."""
    from xdist.scheduler import LoadScopeScheduling

    class Launches(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "launch" if _launches(config.rootpath / nodeid.split("::")[0]) else nodeid

    return Launches(config, log) if config.getvalue("dist") == "load" else None


@functools.cache
def _launches(path: Path) -> bool:
    return "pytest.mark.launch" in path.read_text()


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A small finished data set for runs; read only."""
    from tests.helpers.toy_runs import make_shards

    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def token_shards(shards, tmp_path_factory):
    """The same with what an encoder would give: features of four tokens and a class token; read only."""
    from tests.helpers.parts import add_tokens

    return add_tokens(shards, tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="session")
def array_file(tmp_path_factory):
    """Pictures and labels as an .npz."""
    from tests.helpers.shard_sets import CLASSES, make_images

    images, labels = make_images()
    path = tmp_path_factory.mktemp("source") / "pictures.npz"
    np.savez(path, images=images, labels=labels, class_names=np.array(CLASSES))
    return path


@pytest.fixture(scope="session")
def built(array_file, tmp_path_factory):
    """A finished data set; tests that damage it work on a copy."""
    from tests.helpers.shard_sets import build

    out = tmp_path_factory.mktemp("built") / "shards"
    build(array_file, out)
    return out


@pytest.fixture
def copied(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy")
