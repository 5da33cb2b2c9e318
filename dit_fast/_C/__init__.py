"""The compiled CPU library: loaded when an op first asks for it, absent without failing.

Its operators live in `torch.ops.dit_fast_native`; only `dit_fast.ops` calls them.
"""

import functools

from dit_fast._C.build import LIBRARY, compiler, source_hash

LEVELS = ("portable", "avx2", "avx512")


@functools.cache
def unavailable() -> str | None:
    """Why the library cannot be used here, with the remedy; None when it is loaded."""
    if not LIBRARY.exists():
        remedy = "run `make native`" if compiler() else "install g++ and run `make native`, or copy one built elsewhere"
        return f"{LIBRARY.name} is not built: {remedy}"
    import torch

    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load ({error.__cause__ or error}): run `make native`"
    expected = source_hash()
    if expected is not None and expected not in _description():
        return f"{LIBRARY.name} was built from other sources: run `make native`"
    return None


def describe() -> str:
    """Instruction set and compiler, for `dit-fast info`; the reason if the library cannot be used."""
    return unavailable() or f"{LEVELS[_level()]}, {_description()}"


def _description() -> str:
    import torch

    return torch.ops.dit_fast_native.build_info()


def _level() -> int:
    import torch

    return torch.ops.dit_fast_native.isa_level()
