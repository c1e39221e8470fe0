"""One Triton kernel, sm80 and up; the device code is `pallas_kernels.row_triton_code`."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _triton, _tuned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A program takes a row and walks its columns, ``BLOCK_N`` at a time."""

    BLOCK_N: int = 2048
    num_warps: int = 4
    num_stages: int = 4


def refuses() -> str | None:
    """Why Triton cannot run this call here, or None."""
    return _triton.refuses()


def logsumexp(t: Float[Array, "N V"]) -> Float[Array, " N"]:
    """As `logsumexp` returns it."""
    config = dataclasses.asdict(_tuned.config("logsumexp", "triton", Config, t.shape))
    return _triton.call(
        _triton.row_code().logsumexp,
        t,
        out=jax.ShapeDtypeStruct((len(t),), jnp.float32),
        grid=(len(t),),
        config=config,
        N=t.shape[1],
        STAGES=config["num_stages"],
    )
