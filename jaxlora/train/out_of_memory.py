"""What to do when a step does not fit: XLA's own words are an allocator and a number of bytes."""

import contextlib
import re
from collections.abc import Iterator

import jax

from jaxlora.train.auto import memory_gib
from jaxlora.train.meters import GIB

_WANTED = re.compile(r"(\d+) ?(?:bytes|B)\b")
_OF_DEVICE = (
    'use_gradient_checkpointing="auto" takes the fastest policy that fits, "unsloth" needs least; else lower per_device_train_batch_size '
    "(gradient_accumulation_steps keeps the effective batch) or max_seq_length. JAX takes 75 % of a GPU unless "
    "XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise"
)
_OF_HOST = (
    'use_gradient_checkpointing=True or "attention" needs none of it. XLA pins the next power of two at once, and in all at most '
    "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB (64)"
)


class OutOfMemoryError(MemoryError):
    """A program did not fit into the device's memory, or what waits in the host's into what can be pinned."""


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Inside, XLA's RESOURCE_EXHAUSTED becomes an `OutOfMemoryError` that says of ``what``, in how much, and what to change.

    >>> try:
    ...     with explained("steps of 4 x 2048 tokens"):
    ...         raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of host memory while trying to allocate 9663676416 bytes")
    ... except OutOfMemoryError as error:
    ...     print(str(error).split(":")[0])
    steps of 4 x 2048 tokens do not fit into pinned host memory, of which 9.0 GiB more were wanted
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        said = str(error)
        if "RESOURCE_EXHAUSTED" not in said:
            raise
        found = _WANTED.search(said)
        wanted = f"{int(found[1]) / GIB:.1f} GiB more were wanted" if found else f"as XLA says: {said.splitlines()[0]}"
        if "host memory" in said or "host_bfc" in said:
            raise OutOfMemoryError(f"{what} do not fit into pinned host memory, of which {wanted}: {_OF_HOST}") from error
        stats = jax.local_devices()[0].memory_stats() or {}
        taken = f", where {stats['bytes_in_use'] / GIB:.1f} of {memory_gib():.1f} GiB were taken" if "bytes_in_use" in stats else ""
        raise OutOfMemoryError(f"{what} do not fit into the device's memory, of which {wanted}{taken}: {_OF_DEVICE}") from error
