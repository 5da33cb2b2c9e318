"""Package map: the top-level folders keep their plain names, the only importable name is `dit_fast`.

A bare `kernels`, `train` or `benchmarks` on sys.path would hide other distributions, so they are installed as
`dit_fast.kernels`, `dit_fast.train` and `dit_fast.benchmarks`.

Building also compiles `csrc/` where a compiler and torch's headers (for the ops) or pybind11 (for the shard reader) are
at hand. Without them the install succeeds all the same: plain torch and Python do everything, and `dit-fast info` says
what is missing.
"""

import importlib.util
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

MAPPED = ("kernels", "train", "benchmarks")


class BuildWithLibrary(build_py):
    """Puts the compiled library beside its loader before the package's files are gathered."""

    def run(self):
        path = Path(__file__).resolve().parent / "dit_fast" / "_C" / "build.py"
        spec = importlib.util.spec_from_file_location("dit_fast_native_build", path)
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        native.main()
        super().run()


packages = find_packages(include=["dit_fast", "dit_fast.*"])
for folder in MAPPED:
    packages += [f"dit_fast.{folder}"] + [f"dit_fast.{folder}.{name}" for name in find_packages(folder)]

setup(
    packages=packages,
    package_dir={"dit_fast": "dit_fast", **{f"dit_fast.{folder}": folder for folder in MAPPED}},
    cmdclass={"build_py": BuildWithLibrary},
)
