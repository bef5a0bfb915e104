"""Where a server's memory comes from and goes to; without glibc nothing is done.

A server that follows a long training reads and draws with every update, by whichever thread is
free, and lets go of what it had. What is left lies apart: without these it takes more memory with
every update, though it holds no more.
"""

import ctypes
from contextlib import suppress

_ARENA_MAX, _MMAP_THRESHOLD = -8, -3  # M_ARENA_MAX, M_MMAP_THRESHOLD of malloc.h
_LARGE = 128 * 1024  # bytes: what glibc itself begins with
_OTHER_LIBRARY = (OSError, AttributeError, TypeError)


def configure_heap() -> None:
    """Have all threads take their memory from one heap, but for what is large.

    Else each thread has its own; and glibc, once large blocks were let go of, puts those that
    follow into the heap as well: what is read of a run that grows is a little longer each time and
    does not fit into the hole that it left.
    """
    with suppress(*_OTHER_LIBRARY):
        library = ctypes.CDLL(None)
        library.mallopt(_ARENA_MAX, 1)
        library.mallopt(_MMAP_THRESHOLD, _LARGE)


def give_back() -> None:
    """Return what is free between what is held to the system, which takes about a millisecond."""
    with suppress(*_OTHER_LIBRARY):
        ctypes.CDLL(None).malloc_trim(0)
