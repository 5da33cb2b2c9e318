"""Stands in for `dit-fast train`: logs steps, obeys SIGTERM, fails or waits as the name of its run says."""

import signal
import sys
import time
from pathlib import Path

folder = Path(next(word for word in sys.argv if word.startswith("run.dir=")).partition("=")[2])
signal.signal(signal.SIGTERM, lambda *_: sys.exit((folder / "asked").write_text("") and 0))
with (folder / "metrics.jsonl").open("a") as metrics:
    metrics.write('{"step": 3}\n')
(folder / "starts").open("a").write("x")
kind = folder.parent.name
if kind == "bad" and not (folder.parents[1] / "mended").exists():
    print("warning\ndit-fast: error: data.path=x: is gone\nmore", file=sys.stderr)
    sys.exit(2)
while kind == "slow" and not (folder.parents[1] / "mended").exists():
    time.sleep(0.02)
(folder / "done").write_text("")
