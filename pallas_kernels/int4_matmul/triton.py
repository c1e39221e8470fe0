"""Products with a packed weight in Triton, sm80 and up; the device code is `pallas_kernels.weight_triton_code`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _triton, _tuned
from pallas_kernels.packed import GROUP, Packed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Blocks of rows, of output columns and of the contracted axis; ``BAND`` row blocks in a row share a weight tile in the cache."""

    BLOCK_M: int = 128
    BLOCK_N: int = 128
    BLOCK_K: int = 64
    BAND: int = 8
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self):
        wrong = [name for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps") if (n := getattr(self, name)) < 1 or n & (n - 1)]
        if wrong or min(self.BLOCK_M, self.BLOCK_N, self.BLOCK_K) < 16:
            raise ValueError(f"{self}: blocks and warps must be powers of two, blocks at least 16")


def refuses(x: Array, weight: Packed, update: Any, transpose: bool) -> str | None:
    """Why Triton cannot run this call here, or None."""
    if x.dtype != jnp.bfloat16:
        return f"needs bfloat16, got {x.dtype}"
    return _triton.refuses()


def product(x: Float[Array, "N _"], weight: Packed, update: Any, transpose: bool, config: Config | None = None) -> Float[Array, "N _"]:
    """x Wᵀ or x W, plus the update."""
    rows, depth = x.shape
    columns = weight.shape[1] if transpose else weight.shape[0]
    config = config or _tuned.config("int4_matmul", "triton", Config, (rows, depth, columns))
    blocks = dataclasses.asdict(config)
    # A tile spans whole groups along the packed axis.
    axis = "BLOCK_N" if transpose else "BLOCK_K"
    blocks[axis] = max(blocks[axis], GROUP)
    u, b = (x, x) if update is None else update
    grid = (-(-rows // blocks["BLOCK_M"]) * -(-columns // blocks["BLOCK_N"]),)
    return _triton.call(
        _triton.weight_code().matmul_t if transpose else _triton.weight_code().matmul,
        *(x, weight.codes, weight.scales, weight.scales if weight.code_book is None else weight.code_book, u, b),
        out=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        grid=grid,
        config=blocks,
        **{"M": rows, "N": columns, "K": depth, "R": u.shape[1], "BLOCK_R": _triton.block_r(u.shape[1])},
        FORMAT=weight.format,
        RANKED=update is not None,
    )
