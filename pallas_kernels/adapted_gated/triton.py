"""One Triton kernel, sm80 and up; the device code is `pallas_kernels.float8_triton_code`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _triton, _tuned
from pallas_kernels.int4_matmul.triton import block_r


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A program takes ``BLOCK_M`` rows and walks one of ``SPLITS`` parts of their columns, ``BLOCK_N`` at a time."""

    BLOCK_M: int = 64
    BLOCK_N: int = 128
    SPLITS: int = 4
    num_warps: int = 4
    num_stages: int = 3


def refuses(e: Any, ranks: tuple[int, ...]) -> str | None:
    """Why Triton cannot run this call here, or None."""
    if e.dtype != jnp.bfloat16:
        return f"needs bfloat16, got {e.dtype}"
    if max(ranks) > 128:
        return f"holds up to 128 columns of an adapter, got {max(ranks)}"
    return _triton.refuses()


def made(
    products: tuple[Array, Array], scales: tuple[Array, Array], us: tuple[Array, Array], bs: tuple[Array, Array], a: Array, activation: str
) -> tuple[Array, Array, Array, Array]:
    """As `adapted_gated` returns them."""
    (rows, columns), ranks = products[0].shape, {"R_GATE": us[0].shape[1], "R_UP": us[1].shape[1], "R": a.shape[0]}
    config = dataclasses.asdict(_tuned.config("adapted_gated", "triton", Config, (rows, columns, ranks["R"])))
    splits = config.pop("SPLITS")
    wide = jax.ShapeDtypeStruct((rows, columns), a.dtype)
    e, g, h, parts = _triton.call(
        _triton.float8_code().adapted_gated,
        *(*products, *scales, *us, *bs, a),
        out=(wide, wide, wide, jax.ShapeDtypeStruct((splits, rows, ranks["R"]), jnp.float32)),
        grid=(-(-rows // config["BLOCK_M"]) * splits,),
        config=config,
        # Each element is read by the program that overwrites it.
        in_place={0: 0, 1: 1},
        **{"M": rows, "N": columns, "COLUMNS": -(-columns // (splits * config["BLOCK_N"])) * config["BLOCK_N"]},
        **{"ACTIVATION": activation, **ranks, "BLOCK_GATE": block_r(ranks["R_GATE"])},
        **{"BLOCK_UP": block_r(ranks["R_UP"]), "BLOCK_R": block_r(ranks["R"])},
    )
    return e, g, h, parts.sum(0).astype(a.dtype)
