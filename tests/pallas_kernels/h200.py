"""An H200 that is not there: enough to ask a kernel whether it would run, and to lower it."""

from collections.abc import Callable

import jax
from jax.sharding import AbstractDevice, AbstractMesh


def mesh():
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("a",), abstract_device=device))


def lowered_text(f: Callable, *args) -> str:
    """The StableHLO of ``f`` for CUDA, made on any host."""
    with mesh():
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
