"""Starts `tests/train/engine_worker.py` as a plain process or as ranks, and reads what it wrote."""

import json

from tests.helpers.started import Started
from tests.helpers.toy_runs import ROOT, environment, free_port


def run_engines(out, folder, scenarios, ranks=0, timeout=400):
    """Results by the names of the scenarios, from one start. ranks: 0 is one process without DeepSpeed."""
    listing = out.with_suffix(".scenarios.json")
    listing.write_text(json.dumps(scenarios))
    words = ["-m", "tests.train.engine_worker", out, folder, listing]
    for attempt in ("first", "second"):
        port = str(free_port())
        meet = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **meet} for rank in range(ranks)]
        log = out.with_suffix(f".{attempt}.log")
        started = [Started(words, environment(**place), log, ROOT) for place in places or [{}]]
        try:
            codes = [process.wait(timeout) for process in started]
        finally:
            for process in started:
                process.kill()
        if out.exists():  # a rank may abort in gloo's teardown after its work is done
            return json.loads(out.read_text())
        if attempt == "second" or -6 not in codes:
            raise AssertionError(log.read_text())
    raise AssertionError
