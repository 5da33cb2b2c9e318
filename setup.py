"""Package map: the top-level folders keep their plain names, the only importable name is `dit_fast`.

A bare `kernels`, `train` or `benchmarks` on sys.path would hide other distributions, so they are installed as
`dit_fast.kernels`, `dit_fast.train` and `dit_fast.benchmarks`.
"""

from setuptools import find_packages, setup

MAPPED = ("kernels", "train", "benchmarks")

packages = find_packages(include=["dit_fast", "dit_fast.*"])
for folder in MAPPED:
    packages += [f"dit_fast.{folder}"] + [f"dit_fast.{folder}.{name}" for name in find_packages(folder)]

setup(
    packages=packages,
    package_dir={"dit_fast": "dit_fast", **{f"dit_fast.{folder}": folder for folder in MAPPED}},
)
