"""What the host has of memory, and how much of it may be pinned."""

import contextlib
import os
import pathlib

# Of a container's memory, as cgroups of version 2 and 1 have it: who takes more is killed.
_LIMITS = pathlib.Path("/sys/fs/cgroup/memory.max"), pathlib.Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
# What XLA pins, unless this variable says otherwise.
_POOL, _POOL_GIB = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", 64


def memory_bytes() -> int:
    """The memory of the host, or of the container that this runs in, where it has less."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in _LIMITS:
        # There is none, or it is "max".
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(limit.read_text()))
    return min(sizes)


def room_bytes() -> int:
    """What may be pinned of what need not be: a quarter of the memory, and half of what XLA pins."""
    return min(memory_bytes() // 4, _pool_bytes() // 2)


def can_pin(nbytes: int) -> bool:
    """Whether a program can have so much pinned memory: XLA pins the next power of two, or all that it may, and a quarter has to be left.

    >>> can_pin(0), can_pin(1 << 50)
    (True, False)
    """
    pool = _pool_bytes()
    return nbytes <= pool and (nbytes == 0 or min(1 << (nbytes - 1).bit_length(), pool) <= memory_bytes() * 3 // 4)


def _pool_bytes() -> int:
    return int(os.environ.get(_POOL, _POOL_GIB)) << 30
