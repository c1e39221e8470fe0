"""One Triton kernel, sm80 and up; the device code is `pallas_kernels.triton_code`."""

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
    """A program takes ``BLOCK_M`` rows and walks one of ``SPLITS`` parts of their columns, ``BLOCK_N`` at a time."""

    BLOCK_M: int = 64
    BLOCK_N: int = 128
    SPLITS: int = 4
    num_warps: int = 4
    num_stages: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainConfig(Config):
    """Without a gate there is less to read: narrower blocks."""

    BLOCK_N: int = 64


def refuses(e: Any, ranks: tuple[int, ...]) -> str | None:
    """Why Triton cannot run this call here, or None."""
    if e.dtype != jnp.bfloat16:
        return f"needs bfloat16, got {e.dtype}"
    if max(ranks) > 128:
        return f"holds up to 128 columns of an adapter, got {max(ranks)}"
    return _triton.refuses()


def made(
    products: Sequence[Array],
    scales: Sequence[Array] | None,
    updates: Sequence[tuple[Array, Array]],
    a: Float[Array, "R F"],
    bias: Array | None,
    function: Function,
    padding: int | None,
) -> tuple[Array, Array]:
    """As `adapted_activation` returns them."""
    us, bs = zip(*updates, strict=True)
    (rows, columns), ranks = products[0].shape, {"R_E": us[0].shape[1], "R_G": us[-1].shape[1], "R": a.shape[0]}
    kind = Config if bias is None else PlainConfig
    config = dataclasses.asdict(_tuned.config("adapted_activation", "triton", kind, (rows, columns, ranks["R"])))
    splits = config.pop("SPLITS")
    width = columns if padding is None else columns + ranks["R"] + padding
    constants: dict[str, Any] = {"M": rows, "N": columns, "WIDTH": width, **ranks}
    constants |= {
        "SCALED": scales is not None,
        "GATED": bias is None,
        "ACTIVATION": function.activation,
        "BLOCK_E": _triton.block_r(ranks["R_E"]),
        "BLOCK_G": _triton.block_r(ranks["R_G"]),
        "BLOCK_R": _triton.block_r(ranks["R"]),
    }
    h, parts = _triton.call(
        _triton.device_code().adapted_activation,
        # Without a gate the bias is in its product's place, and nothing else of it is read.
        *(products[0], products[-1] if bias is None else bias),
        # What is not SCALED reads no scales.
        *(each for pair in (scales or us, us, bs) for each in (pair[0], pair[-1])),
        a,
        out=(jax.ShapeDtypeStruct((rows, width), a.dtype), jax.ShapeDtypeStruct((splits, rows, ranks["R"]), jnp.float32)),
        grid=(-(-rows // config["BLOCK_M"]) * splits,),
        config=config,
        COLUMNS=-(-columns // (splits * config["BLOCK_N"])) * config["BLOCK_N"],
        STAGES=config["num_stages"],
        **constants,
    )
    u = parts.sum(0).astype(a.dtype)
    return _triton.put_beside(h, u, padding), u
