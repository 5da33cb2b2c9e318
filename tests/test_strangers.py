"""What comes from a stranger is data: no door of the package executes it. Each is given what would run if it could."""

import ast
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_fast.analysis import study
from dit_fast.autoencoders import taef2
from dit_fast.checkpoint.run import load_run
from dit_fast.cli import main
from dit_fast.data import open_dataset
from dit_fast.errors import UserError
from dit_fast.evaluation.features import read_statistics
from dit_fast.evaluation.sources import ArrayImages
from dit_fast.published import read_published
from dit_fast.sampling.samples import Samples

PACKAGE = Path(__file__).parents[1]
ROOMS = ("dit_fast", "train", "kernels", "benchmarks", "examples")


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path):
    """Must not be there at the end."""
    mark = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(mark)))  # it would work
    mark.rmdir()
    yield mark
    assert not mark.exists(), "a stranger's file was executed"


def pickled(mark: Path) -> bytes:
    return pickle.dumps(Bomb(mark))


def saved(mark: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"model": Bomb(mark), "weight": Bomb(mark)}, file)
    return file.getvalue()


def npz(mark: Path, **more) -> bytes:
    """Every array that some door asks for, as an object."""
    file, bomb = io.BytesIO(), np.array([Bomb(mark)], dtype=object)
    names = (
        "label",
        "step",
        "text",
        "mu",
        "sigma",
        "network",
        "sha256",
        "count",
        "protocol",
        "steps",
        "times",
        "cka_rbf",
    )
    np.savez(file, **(dict.fromkeys(names, bomb) | {"arr_0": bomb} | more))
    return file.getvalue()


def npy(mark: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    return file.getvalue()


class Anyone:
    identity = "anyone"


def decoder(path: Path) -> Path:
    """A folder whose weights are this file."""
    folder = path.parent / "taef2"
    folder.mkdir()
    for name in taef2.FILES:
        shutil.copy(path, folder / name)
    return folder


IMAGES = np.zeros((2, 8, 8, 3), np.uint8)
FILES = {  # door -> (content, what opens a path)
    "weights, torch.save": (saved, read_published),
    "weights, pickle": (pickled, read_published),
    "decoder": (saved, lambda path: taef2.TinyFlux2.load(decoder(path))),
    "samples": (npz, Samples.load),
    "drawn images": (lambda mark: npz(mark, arr_0=IMAGES), ArrayImages),
    "reference statistics": (npz, lambda path: read_statistics(path, Anyone())),
    "analysis": (npz, study.read),
}


@pytest.mark.parametrize("door", FILES)
def test_no_file_is_executed(door, mark, tmp_path):
    content, opens = FILES[door]
    (tmp_path / "given").write_bytes(content(mark))
    with pytest.raises(UserError):
        opens(tmp_path / "given")


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.json", "MANIFEST.json"])
def test_no_file_of_a_run_is_executed(place, name, mark, tmp_path):
    run = shutil.copytree(place / "plain", tmp_path / "run")
    for path in (run / "checkpoints").glob(f"*/{name}"):
        path.write_bytes(saved(mark) if path.suffix == ".safetensors" else pickled(mark))
    with pytest.raises(UserError):
        load_run(run, weights="model" if name.startswith("model") else "ema")


def test_no_member_of_a_shard_is_executed(place, mark, tmp_path):
    """Its length is that of the member it replaces, its checksums are right, and names are those of pickles."""
    from tests.helpers.damage import read, replace_member

    shards = shutil.copytree(place / "shards", tmp_path / "shards")
    (tar, *_) = sorted(shards.glob("*.tar"))
    length = int(open_dataset(shards).indexes[0].length[0, 0])
    replace_member(shards, tar, 0, 0, npy(mark).ljust(length, b"\0")[:length])
    for reader in ("python", "compiled"):
        with pytest.raises(UserError):
            read(shards, reader)


JOURNALS = ("metrics.jsonl", "evaluations.jsonl", "history.jsonl", "quarantine.jsonl", "samples.npz", "lock.json")


def test_a_strangers_run_is_reported_without_running_its_words(place, mark, tmp_path, capsys):
    """Markup in what a run says of itself stays text; pickles where JSON should be are named or passed over."""
    words = "</script><script>alert(1)</script>"
    run = shutil.copytree(place / "plain", tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["data"]["path"] = words
    (run / "config.json").write_text(json.dumps(config))
    (run / "evaluations.jsonl").write_text("")
    assert main(["report", str(run), "--out", str(tmp_path / "page"), "--note", words]) == 0
    page = (tmp_path / "page/report.html").read_text()
    assert "alert(1)" in page
    assert words not in page
    for name in JOURNALS:
        kept = (run / name).read_bytes() if (run / name).exists() else None
        (run / name).write_bytes(npz(mark) if name.endswith("npz") else pickled(mark))
        assert main(["watch", str(run), "--once"]) in (0, 2)
        assert main(["report", str(run), "--out", str(tmp_path / "page")]) in (0, 2)
        (run / name).unlink() if kept is None else (run / name).write_bytes(kept)
    assert "Traceback" not in capsys.readouterr().err


OWN_TEXT = {"dit_fast/ops/traced.py": "exec"}  # of names that it counts up, and of numbers: no word of a caller


def test_the_sources_open_no_such_door():
    """np.load says allow_pickle=False, torch.load weights_only=True; pickle.load, eval, exec, a shell: nowhere else."""
    found = []
    for room in ROOMS:
        for path in sorted((PACKAGE / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                where = str(path.relative_to(PACKAGE))
                if isinstance(node, ast.Call) and (said := _said(node)) and OWN_TEXT.get(where) != said:
                    found.append(f"{where}:{node.lineno}: {said}")
    assert not found, "\n".join(found)


def _said(call: ast.Call) -> str | None:
    name, given = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
    if name in ("np.load", "numpy.load"):
        return None if given.get("allow_pickle") == "False" or "mmap_mode" in given else "allow_pickle=False is missing"
    if name == "torch.load":
        return None if given.get("weights_only") == "True" else "weights_only=True is missing"
    if name in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system", "marshal.loads"):
        return name
    return "shell=True" if given.get("shell") == "True" else None
