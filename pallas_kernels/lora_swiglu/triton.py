"""act(gate x) ∘ up x in one Triton kernel, sm80 and up; the device code is `pallas_kernels.weight_triton_code`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _triton, _tuned
from pallas_kernels.int4_matmul.triton import Config as ProductConfig
from pallas_kernels.packed import Packed, Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ProductConfig):
    """As of one product; half as many columns, since there are two accumulators."""

    BLOCK_N: int = 64


def refuses(x: Array, gate: Weight, up: Weight, ranks: int, activation: str) -> str | None:
    """Why Triton cannot run this call here, or None."""
    if x.dtype != jnp.bfloat16:
        return f"needs bfloat16, got {x.dtype}"
    return _triton.refuses()


def gated(
    x: Float[Array, "N I"], gate: Weight, up: Weight, update: Any, activation: str, config: Config | None = None
) -> tuple[Float[Array, "N F"], Float[Array, "N F"], Float[Array, "N F"]]:
    """(h, e, g)."""
    (rows, depth), columns = x.shape, gate.shape[0]
    config = config or _tuned.config("lora_swiglu", "triton", Config, (rows, depth, columns))
    u, *bs = (x, x, x) if update is None else update
    out = jax.ShapeDtypeStruct((rows, columns), x.dtype)
    return _triton.call(
        _triton.weight_code().gated,
        *(x, *_pointers(gate, x.dtype), *_pointers(up, x.dtype), u, *bs),
        out=(out,) * 3,
        grid=(-(-rows // config.BLOCK_M) * -(-columns // config.BLOCK_N),),
        config=dataclasses.asdict(config),
        **{"M": rows, "N": columns, "K": depth, "R": u.shape[1], "BLOCK_R": _triton.block_r(u.shape[1])},
        **{"GATE": _format(gate), "UP": _format(up), "ACTIVATION": activation, "RANKED": update is not None, "SAVED": True},
    )


def _format(weight: Weight) -> str:
    return weight.format if isinstance(weight, Packed) else "dense"


def _pointers(weight: Weight, dtype: Any) -> tuple[Array, Array, Array]:
    """Codes, scales and code book; what a format does not have is an array that is not read."""
    if not isinstance(weight, Packed):
        dense = weight.astype(dtype)
        return dense, dense, dense
    return weight.codes, weight.scales, weight.scales if weight.code_book is None else weight.code_book
