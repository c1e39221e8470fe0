"""One Triton kernel, sm80 and up; the device code is `pallas_kernels.triton_code`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _triton, _tuned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A program takes ``BLOCK_N`` columns and walks the rows of one of ``SPLITS`` parts, ``BLOCK_M`` at a time."""

    BLOCK_M: int = 32
    BLOCK_N: int = 64
    SPLITS: int = 8
    num_warps: int = 4
    num_stages: int = 3


def refuses(e: Any, ranks: tuple[int, ...]) -> str | None:
    """Why Triton cannot run this call here, or None."""
    if e.dtype != jnp.bfloat16:
        return f"needs bfloat16, got {e.dtype}"
    if max(ranks) > 128:
        return f"holds sums of up to 128 columns, got {max(ranks)}"
    return _triton.refuses()


def gradients(
    both: tuple[Float[Array, "N F"], Float[Array, "N F"]],
    dh: Float[Array, "N F"],
    us: tuple[Array, Array],
    du: Array,
    a: Array,
    scales: Float[Array, " N"] | None,
    unadapted: Any,
    activation: str,
    padding: int | None,
) -> Any:
    """As `gated_gradients` returns them."""
    rows, columns = dh.shape
    (e_scales, g_scales), bs = ((None, None), (du, du)) if unadapted is None else zip(*unadapted, strict=True)
    config = dataclasses.asdict(_tuned.config("gated_gradients", "triton", Config, (rows, columns, du.shape[1])))
    splits = config.pop("SPLITS")
    ranks = [u.shape[1] for u in (*us, du)]
    stride = columns if padding is None else 2 * columns + padding
    out = jax.ShapeDtypeStruct((rows, stride), dh.dtype)
    # Nothing is written to the second where the first takes both.
    second = out if padding is None else jax.ShapeDtypeStruct((1,), dh.dtype)
    shapes = [(columns, ranks[0]), (columns, ranks[1]), (ranks[2], columns)]
    sums = [jax.ShapeDtypeStruct((splits, *shape), jnp.float32) for shape in shapes]
    names = ("GATE", "UP", "DOWN")
    de, dg, *parts = _triton.call(
        _triton.device_code().gated_gradients,
        # What there is not, it does not read.
        *(*both, dh, *us, du, a, *(du if s is None else s for s in (scales, e_scales, g_scales)), *bs),
        out=(out, second, *sums),
        grid=(-(-columns // config["BLOCK_N"]) * splits,),
        config=config,
        # Where e and dh are not needed any more; each element is read by the program that overwrites it.
        in_place={0: 0, 2: 1} if padding is None else None,
        **{"M": rows, "N": columns, "STRIDE": stride, "ROWS": -(-rows // (splits * config["BLOCK_M"])) * config["BLOCK_M"]},
        **{"ACTIVATION": activation, "STAGES": config["num_stages"]},
        **{"SCALED": scales is not None, "UNADAPTED": unadapted is not None, "UNSCALED": e_scales is not None},
        **{f"R_{name}": rank for name, rank in zip(names, ranks, strict=True)},
        **{f"BLOCK_{name}": _triton.block_r(rank) for name, rank in zip(names, ranks, strict=True)},
    )
    wide = (de, dg) if padding is None else (_triton.put_beside(de, jnp.zeros((rows, 0), de.dtype), padding),)
    return *wide, *(part.sum(0) for part in parts)
