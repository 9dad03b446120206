"""Memory that a computation on CPU gives back and wants again at its next step.

XLA allocates what a program needs anew each time it runs. By default glibc hands large pieces back
to the system, which clears every page when it is touched again: up to half the time of a training
step on CPU.
"""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Keeps freed memory in this process, for its next step; whether that could be arranged.

    To be called before much is allocated, at best before `import jax`: threads that have begun to
    allocate keep to their own arenas. Elsewhere than with glibc nothing happens.

    >>> keep_freed_memory() in (True, False)
    True
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return False
    return all([mallopt(ARENA_MAX, 1), mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, -1)])
