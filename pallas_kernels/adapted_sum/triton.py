"""One Triton kernel, sm80 and up; the device code is `pallas_kernels.triton_code`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _triton, _tuned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A program takes ``BLOCK_M`` rows and walks one of ``SPLITS`` parts of their columns, ``BLOCK_N`` at a time."""

    BLOCK_M: int = 64
    BLOCK_N: int = 128
    SPLITS: int = 16
    num_warps: int = 4
    num_stages: int = 2


def refuses(z: Any, rank: int) -> str | None:
    """Why Triton cannot run this call here, or None."""
    if z.dtype != jnp.bfloat16:
        return f"needs bfloat16, got {z.dtype}"
    if rank > 128:
        return f"holds up to 128 columns of an adapter, got {rank}"
    return _triton.refuses()


def total(z: Float[Array, "N C"], scales: Float[Array, " N"] | None, u: Float[Array, "N R"], b: Float[Array, "F R"]) -> Float[Array, "N F"]:
    """As `adapted_sum` returns it."""
    rows, (columns, rank) = len(z), b.shape
    config = dataclasses.asdict(_tuned.config("adapted_sum", "triton", Config, (rows, columns, rank)))
    splits = config.pop("SPLITS")
    return _triton.call(
        _triton.device_code().adapted_sum,
        # What is not SCALED reads no scales.
        *(z, u if scales is None else scales, u, b),
        out=jax.ShapeDtypeStruct((rows, columns), z.dtype),
        grid=(-(-rows // config["BLOCK_M"]) * splits,),
        config=config,
        **{"M": rows, "N": columns, "WIDTH": z.shape[1], "R": rank, "BLOCK_R": _triton.block_r(rank), "SCALED": scales is not None},
        COLUMNS=-(-columns // (splits * config["BLOCK_N"])) * config["BLOCK_N"],
        STAGES=config["num_stages"],
    )
