"""One Triton kernel, sm89 and up; the device code is `pallas_kernels.float8_triton_code`."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _kernel, _triton, _tuned
from pallas_kernels.float8_rows import E4M3
from pallas_kernels.packed import GROUP, Packed

_MOST_WEIGHTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A program turns a tile of ``BLOCK_M`` rows and ``BLOCK_N`` columns of a weight, whole groups."""

    BLOCK_M: int = 64
    BLOCK_N: int = 256
    num_warps: int = 4
    num_stages: int = 1


def refuses(weights: Sequence[Packed]) -> str | None:
    """Why Triton cannot run this call here, or None."""
    rows = [weight.shape[0] for weight in weights]
    if any(count % 4 for count in rows):
        return f"writes the rows of a weight in fours, got {', '.join(map(str, rows))}"
    if len(weights) > _MOST_WEIGHTS or len({(weight.format, weight.layer is None) for weight in weights}) > 1:
        return f"takes up to {_MOST_WEIGHTS} weights of one format, all of them parts of stacks or none, got {len(weights)}"
    return _kernel.device().lacks((8, 9)) or _triton.refuses()


def transposed(weights: Sequence[Packed], scale: Float[Array, ""]) -> Float[Array, "columns O"]:
    """As `float8_transposed` returns it."""
    rows, columns = [weight.shape[0] for weight in weights], 2 * weights[0].codes.shape[-1]
    config = dataclasses.asdict(_tuned.config("float8_transposed", "triton", Config, (sum(rows), columns)))
    config["BLOCK_N"] = max(config["BLOCK_N"], GROUP)
    # Of a weight without rows nothing is read.
    absent = _MOST_WEIGHTS - len(weights)
    bands = sum(-(-count // config["BLOCK_M"]) for count in rows)
    words = _triton.call(
        _triton.float8_code().float8_transposed,
        *(array for weight in [*weights, *[weights[0]] * absent] for array in _triton.packed_arrays(weight)),
        scale.reshape(1),
        out=jax.ShapeDtypeStruct((columns, sum(rows) // 4), jnp.uint32),
        grid=(bands * -(-columns // config["BLOCK_N"]),),
        config=config,
        **dict(zip(("MX", "MY", "MZ"), [*rows, *[0] * absent], strict=True)),
        **{"WIDTH": columns, "FORMAT": weights[0].format, "STACKED": weights[0].layer is not None},
    )
    return jax.lax.bitcast_convert_type(words, E4M3).reshape(columns, -1)
