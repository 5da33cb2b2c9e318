"""Memory that a run on the CPU frees stays with the process, for its next step.

glibc gives large blocks back to the kernel as they are freed, and the next step meets their pages again one fault at a
time: of the quick-start model's step 8 to 40 of 420 to 480 ms, the more the busier the machine.
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT, _LARGEST = (1 << 31) - 1, (1 << 30, 32 << 20)  # bytes; older versions of glibc take no more than the second


def keep_memory() -> bool:
    """For the rest of this process. False where malloc is not glibc's, or another one is preloaded."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _KEPT)) and any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST)
