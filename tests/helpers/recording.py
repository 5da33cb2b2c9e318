"""Numbers of long tests that the documentation names: RECORD=1 before the test's command writes them down."""

import os
from contextlib import contextmanager

import torch

from dit_fast.benchmarks.results import RESULTS, environment, occasion, write


@contextmanager
def recording(name, parts, **versions):
    """A dict to fill, for benchmarks/results/cpu/<name>.json if RECORD is set and all `parts`, once passed, are there.

    The command is this process's. versions: of libraries that the values are also of.
    """
    where, values = environment(torch.device("cpu")), {}
    where["versions"].update({library.replace("_", "-"): version for library, version in versions.items()})
    yield values
    if os.environ.get("RECORD") and set(values) == set(parts):
        write(RESULTS / "cpu" / f"{name}.json", {"test": name, **where, **occasion(), "values": values})
