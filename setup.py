"""Building also compiles `csrc/` where a compiler and torch's headers (for the ops) or pybind11 (for the shard reader)
are at hand. Without them the install succeeds all the same: plain torch and Python do everything, and `dit-fast info`
says what is missing.
"""

import importlib.util
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py


class BuildWithLibrary(build_py):
    """Puts the compiled library beside its loader before the package's files are gathered."""

    def run(self):
        path = Path(__file__).resolve().parent / "dit_fast" / "_C" / "build.py"
        spec = importlib.util.spec_from_file_location("dit_fast_native_build", path)
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        native.main()
        super().run()


class WithLibrary(Distribution):
    """A wheel holds machine code, so its name says for which system and Python."""

    def has_ext_modules(self):
        return True


setup(distclass=WithLibrary, cmdclass={"build_py": BuildWithLibrary})
