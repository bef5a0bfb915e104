"""Where a server's memory comes from and goes to; without glibc nothing is done.

A server that follows a long training reads and draws with every update, by whichever thread is
free, and lets go of what it had. What is left lies apart: without these it takes more memory with
every update, though it holds no more.
"""

import ctypes
from contextlib import suppress

_ARENA_MAX = -8  # M_ARENA_MAX of malloc.h
_OTHER_LIBRARY = (OSError, AttributeError, TypeError)


def share_one_heap() -> None:
    """Have all threads take their memory from one heap; else each has its own."""
    with suppress(*_OTHER_LIBRARY):
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)


def give_back() -> None:
    """Return what is free between what is held to the system, which takes about a millisecond."""
    with suppress(*_OTHER_LIBRARY):
        ctypes.CDLL(None).malloc_trim(0)
