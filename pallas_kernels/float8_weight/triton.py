"""One Triton kernel, sm89 and up; the device code is `pallas_kernels.float8_triton_code`."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _kernel, _triton, _tuned
from pallas_kernels.float8_rows import E4M3
from pallas_kernels.packed import GROUP, Packed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A program takes ``BLOCK_M`` rows and ``BLOCK_N`` columns, whole groups."""

    BLOCK_M: int = 8
    BLOCK_N: int = 1024
    num_warps: int = 4
    num_stages: int = 1


def refuses(weight: Packed) -> str | None:
    """Why Triton cannot run this call here, or None."""
    return _kernel.device().lacks((8, 9)) or _triton.refuses()


def decoded(weight: Packed, scale: Float[Array, ""]) -> Float[Array, "O columns"]:
    """As `float8_weight` returns it."""
    rows, columns = weight.shape[0], 2 * weight.codes.shape[-1]
    config = dataclasses.asdict(_tuned.config("float8_weight", "triton", Config, (rows, columns)))
    config["BLOCK_N"] = max(config["BLOCK_N"], GROUP)
    words = _triton.call(
        _triton.float8_code().float8_weight,
        *_triton.packed_arrays(weight),
        scale.reshape(1),
        out=jax.ShapeDtypeStruct((rows, columns // 4), jnp.uint32),
        grid=(-(-rows // config["BLOCK_M"]) * -(-columns // config["BLOCK_N"]),),
        config=config,
        **{"M": rows, "WIDTH": columns, "FORMAT": weight.format, "STACKED": weight.layer is not None},
    )
    return jax.lax.bitcast_convert_type(words, E4M3).reshape(rows, -1)
