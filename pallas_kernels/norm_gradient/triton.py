"""One Triton kernel, sm80 and up; the device code is `pallas_kernels.row_triton_code`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _triton, _tuned
from pallas_kernels.functions import Function


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A program takes ``BLOCK_M`` rows with all their columns."""

    BLOCK_M: int = 1
    num_warps: int = 4
    num_stages: int = 1


def refuses(x: Any) -> str | None:
    """Why Triton cannot run this call here, or None."""
    return f"needs bfloat16, got {x.dtype}" if x.dtype != jnp.bfloat16 else _triton.refuses()


def gradient(function: Function, inputs: Sequence[Array], dy: Float[Array, "N D"], past: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """As `norm_gradient` returns it."""
    x, weight = inputs[:2]
    config = dataclasses.asdict(_tuned.config("norm_gradient", "triton", Config, x.shape))
    return _triton.call(
        _triton.row_code().norm_gradient,
        *(x, weight, dy, past),
        out=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(-(-x.shape[0] // config["BLOCK_M"]),),
        config={**config, "BLOCK_N": 1 << (x.shape[1] - 1).bit_length()},
        **{"M": x.shape[0], "N": x.shape[1]},
        **{"CENTRED": function.form == "layer_norm", "EPS": function.eps},
    )
