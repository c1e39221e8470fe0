"""One Triton kernel, sm89 and up; the device code is `pallas_kernels.float8_triton_code`."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _kernel, _triton, _tuned
from pallas_kernels.float8_rows.xla import E4M3

# Beyond, a row's elements do not fit the registers of its program.
_MOST_COLUMNS = 65536


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A program takes ``BLOCK_M`` rows with all their columns."""

    BLOCK_M: int = 1
    num_warps: int = 8
    num_stages: int = 1


def refuses(x: Array) -> str | None:
    """Why Triton cannot run this call here, or None."""
    if x.dtype != jnp.bfloat16:
        return f"needs bfloat16, got {x.dtype}"
    if x.shape[1] > _MOST_COLUMNS:
        return f"holds rows of up to {_MOST_COLUMNS} columns, got {x.shape[1]}"
    return _kernel.device().lacks((8, 9)) or _triton.refuses()


def rows(x: Float[Array, "N C"]) -> tuple[Float[Array, "N C"], Float[Array, " N"]]:
    """As `float8_rows` returns them."""
    count, columns = x.shape
    config = dataclasses.asdict(_tuned.config("float8_rows", "triton", Config, x.shape))
    return _triton.call(
        _triton.float8_code().float8_rows,
        x,
        out=(jax.ShapeDtypeStruct(x.shape, E4M3), jax.ShapeDtypeStruct((count,), jnp.float32)),
        grid=(-(-count // config["BLOCK_M"]),),
        config={**config, "BLOCK_N": 1 << (columns - 1).bit_length()},
        M=count,
        N=columns,
    )
