"""One Triton kernel, sm80 and up; the device code is `pallas_kernels.triton_code`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _triton, _tuned
from pallas_kernels.gated_gradients import triton as gated_gradients
from pallas_kernels.gated_gradients.triton import refuses

__all__ = ["Config", "gradients", "refuses"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(gated_gradients.Config):
    """Without a gate there is less to read: more rows at a time, and more parts under way."""

    BLOCK_M: int = 64
    SPLITS: int = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnadaptedConfig(Config):
    """What is made of a tile before it is used takes registers."""

    BLOCK_M: int = 32


def gradients(
    e: Float[Array, "N F"],
    bias: Float[Array, "1 F"],
    dh: Float[Array, "N F"],
    u: Array,
    du: Array,
    update: Any,
    unadapted: Any,
    activation: str,
) -> Any:
    """As `plain_gradients` returns them."""
    rows, columns = e.shape
    e_scales, b = (None, du) if unadapted is None else unadapted
    kind = Config if unadapted is None else UnadaptedConfig
    config = dataclasses.asdict(_tuned.config("plain_gradients", "triton", kind, (rows, columns, du.shape[1])))
    splits = config.pop("SPLITS")
    ranks = {"UP": u.shape[1], "DOWN": du.shape[1]}
    sums = [jax.ShapeDtypeStruct((splits, *shape), jnp.float32) for shape in ((columns, ranks["UP"]), (ranks["DOWN"], columns))]
    de, *parts = _triton.call(
        _triton.device_code().plain_gradients,
        *(e, bias, dh, u, du),
        # What there is not, it does not read.
        *((du, du) if update is None else reversed(update)),
        *(du if e_scales is None else e_scales, b),
        out=(jax.ShapeDtypeStruct(e.shape, e.dtype), *sums),
        grid=(-(-columns // config["BLOCK_N"]) * splits,),
        config=config,
        # Where dh is not needed any more; each element is read by the program that overwrites it.
        in_place={2: 0},
        **{"M": rows, "N": columns, "ROWS": -(-rows // (splits * config["BLOCK_M"])) * config["BLOCK_M"], "ACTIVATION": activation},
        STAGES=config["num_stages"],
        **{"SCALED": update is not None, "UNADAPTED": unadapted is not None, "UNSCALED": e_scales is not None},
        **{f"R_{name}": rank for name, rank in ranks.items()},
        **{f"BLOCK_{name}": _triton.block_r(rank, summing=unadapted is None) for name, rank in ranks.items()},
    )
    return de, *(part.sum(0) for part in parts)
