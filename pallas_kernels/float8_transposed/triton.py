"""One Triton kernel, sm89 and up; the device code is `pallas_kernels.float8_triton_code`."""

import dataclasses

import jax
from jaxtyping import Array, Float

from pallas_kernels import _kernel, _triton, _tuned
from pallas_kernels.float8_rows import E4M3
from pallas_kernels.packed import GROUP, Packed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A program turns a tile of ``BLOCK_M`` rows and ``BLOCK_N`` columns of the weight, whole groups."""

    BLOCK_M: int = 128
    BLOCK_N: int = 128
    num_warps: int = 8
    num_stages: int = 1


def refuses(weight: Packed) -> str | None:
    """Why Triton cannot run this call here, or None."""
    return _kernel.device().lacks((8, 9)) or _triton.refuses()


def transposed(weight: Packed, scale: Float[Array, ""]) -> Float[Array, "columns O"]:
    """As `float8_transposed` returns it."""
    rows, columns = weight.codes.shape[0], 2 * weight.codes.shape[1]
    config = dataclasses.asdict(_tuned.config("float8_transposed", "triton", Config, (rows, columns)))
    config["BLOCK_N"] = max(config["BLOCK_N"], GROUP)
    return _triton.call(
        _triton.float8_code().float8_transposed,
        *(weight.codes, weight.scales, weight.scales if weight.code_book is None else weight.code_book, scale.reshape(1)),
        out=jax.ShapeDtypeStruct((columns, rows), E4M3),
        grid=(-(-rows // config["BLOCK_M"]) * -(-columns // config["BLOCK_N"]),),
        config=config,
        **{"M": rows, "WIDTH": columns, "FORMAT": weight.format},
    )
