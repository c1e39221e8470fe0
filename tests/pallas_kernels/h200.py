"""An H200 that is not there: enough to ask a kernel whether it would run, and to lower it."""

from unittest import mock

import jax

from pallas_kernels import _kernel


def pretended(memory_bytes=None):
    # Not an abstract mesh: cuDNN's primitives refuse to be lowered under one.
    return mock.patch.object(_kernel, "device", lambda: _kernel.Device("gpu", (9, 0), memory_bytes))


def lowered_text(f, *args) -> str:
    """The StableHLO of ``f`` for CUDA, made on any host."""
    with pretended():
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
