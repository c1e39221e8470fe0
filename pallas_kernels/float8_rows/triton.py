"""One Triton kernel, sm89 and up; the device code is `pallas_kernels.float8_triton_code`."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _kernel, _triton, _tuned
from pallas_kernels.float8_rows.xla import E4M3

# Beyond, a row's elements do not fit the registers of its program.
_MOST_COLUMNS = 65536
_MOST_PARTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A program takes ``BLOCK_M`` rows with all their columns."""

    BLOCK_M: int = 1
    num_warps: int = 8
    num_stages: int = 1


def refuses(parts: Sequence[Array]) -> str | None:
    """Why Triton cannot run this call here, or None."""
    if any(part.dtype != jnp.bfloat16 for part in parts):
        return f"needs bfloat16, got {', '.join(str(part.dtype) for part in parts)}"
    columns = sum(_block(part.shape[1]) for part in parts)
    if columns > _MOST_COLUMNS or len(parts) > _MOST_PARTS:
        return f"holds rows of up to {_MOST_COLUMNS} columns of up to {_MOST_PARTS} arrays, got {columns} of {len(parts)}"
    return _kernel.device().lacks((8, 9)) or _triton.refuses()


def rows(parts: Sequence[Float[Array, "N _"]]) -> tuple[Float[Array, "N C"], Float[Array, " N"]]:
    """As `float8_rows` returns them."""
    count, widths = len(parts[0]), [part.shape[1] for part in parts]
    # An element takes a register, and more of them a thread are slower: 28,672 columns 213 us with 32 warps, 260 with 8 (8,192 rows, H200).
    warps = min(max(sum(map(_block, widths)) // 1024, Config.num_warps), 32)
    kind = functools.partial(Config, num_warps=warps)
    config = dataclasses.asdict(_tuned.config("float8_rows", "triton", kind, (count, sum(widths))))
    absent = _MOST_PARTS - len(parts)
    blocks = zip(("BLOCK_X", "BLOCK_Y", "BLOCK_Z"), [*map(_block, widths), *[1] * absent], strict=True)
    return _triton.call(
        _triton.float8_code().float8_rows,
        # Of an array without columns nothing is read.
        *(*parts, *[parts[0]] * absent),
        out=(jax.ShapeDtypeStruct((count, sum(widths)), E4M3), jax.ShapeDtypeStruct((count,), jnp.float32)),
        grid=(-(-count // config["BLOCK_M"]),),
        config={**config, **dict(blocks)},
        M=count,
        **dict(zip(("NX", "NY", "NZ"), [*widths, *[0] * absent], strict=True)),
    )


def _block(columns: int) -> int:
    return 1 << (columns - 1).bit_length()
