"""Two Triton kernels, sm80 and up; the device code is in `pallas_kernels.triton_code` and `pallas_kernels.row_triton_code`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _triton, _tuned
from pallas_kernels.functions import Function

_MOST_COLUMNS = 128
# As many columns behind h are written by one kernel, of whatever width.
_SPARE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A program takes ``BLOCK_M`` rows and walks one of ``SPLITS`` parts of their columns, ``BLOCK_N`` at a time.

    Of a norm it takes ``NORM_ROWS`` rows with all their columns.
    """

    BLOCK_M: int = 64
    BLOCK_N: int = 128
    SPLITS: int = 4
    NORM_ROWS: int = 1
    num_warps: int = 4
    num_stages: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainConfig(Config):
    """Without a gate there is less to read: narrower blocks, and more of them under way."""

    BLOCK_N: int = 64
    num_stages: int = 3


def refuses(function: Function, x: Any, rank: int) -> str | None:
    """Why Triton cannot run this call here, or None."""
    if x.dtype != jnp.bfloat16:
        return f"needs bfloat16, got {x.dtype}"
    if rank > _MOST_COLUMNS:
        return f"holds sums of up to {_MOST_COLUMNS} columns, got {rank}"
    return _triton.refuses()


def columns(function: Function, inputs: Sequence[Array], a: Float[Array, "R F"], padding: int | None) -> tuple[Array, Array, Array | None]:
    """As `lora_input` returns them."""
    (rows, width), rank = inputs[0].shape, a.shape[0]
    kind = PlainConfig if function.form == "plain" else Config
    config = dataclasses.asdict(_tuned.config("lora_input", "triton", kind, (rows, width, rank)))
    splits, norm_rows = config.pop("SPLITS"), config.pop("NORM_ROWS")
    spare = 0 if padding is None else rank + padding
    both = jax.ShapeDtypeStruct((rows, width + spare), a.dtype)
    if function.form in ("plain", "gated"):
        both, parts = _triton.call(
            _triton.device_code().activated_input,
            *(*inputs, a),
            out=(both, jax.ShapeDtypeStruct((splits, rows, rank), jnp.float32)),
            grid=(-(-rows // config["BLOCK_M"]) * splits,),
            config=config,
            **{"M": rows, "N": width, "WIDTH": width + spare, "R": rank, "BLOCK_R": _triton.block_r(rank, summing=True)},
            **{"COLUMNS": -(-width // (splits * config["BLOCK_N"])) * config["BLOCK_N"]},
            **{"GATED": function.form == "gated", "ACTIVATION": function.activation},
        )
        u, statistics = parts.sum(0).astype(a.dtype), None
    else:
        both, statistics = _triton.call(
            _triton.row_code().normed_input,
            # rms_norm reads no bias.
            *(*inputs, inputs[1])[:3],
            both.shape[1],
            out=(both, jax.ShapeDtypeStruct((rows, 2 if function.form == "layer_norm" else 1), jnp.float32)),
            grid=(-(-rows // norm_rows),),
            config={**config, "BLOCK_M": norm_rows, "BLOCK_N": 1 << (width - 1).bit_length()},
            **{"M": rows, "N": width, "BLOCK_SPARE": max(_SPARE, _triton.block_r(spare)), "ALIGNED": both.shape[1] % 16 == 0},
            **{"CENTRED": function.form == "layer_norm", "EPS": function.eps},
        )
        # With zeros below a: a slice of `both` would be copied.
        u = jax.lax.dot_general(both, jnp.pad(a, ((0, 0), (0, spare))), (((1,), (1,)), ((), ())))
    return _triton.put_beside(both, u, padding), u, statistics
