"""Mosaic GPU device code (sm90): the input gradient of a product with 4-bit codes, dx = dy W.

It contracts across the packed axis, so a decoded tile cannot be the register operand: the two compute warpgroups decode half of it each
into shared memory, and both multiply by the whole.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.mosaic_code import COMPUTE, accumulator, decode_tile, fill, launch, tiled, whole_tiles, widened
from pallas_kernels.packed import GROUP, Packed

# Decoded columns of a tile: a group for each compute warpgroup.
_TILE = COMPUTE * GROUP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """``block_m`` rows of dy a compute warpgroup, ``stages`` tiles in flight; ``band`` tiles in a row share their rows or columns."""

    block_m: int = 128
    stages: int = 3
    band: int = 8
    registers: int = 232

    def __post_init__(self):
        if self.block_m not in (64, 128) or self.stages < 2:
            raise ValueError(f"{self}: block_m must be 64 or 128, and stages at least 2")


def refuses_shape(weight: Packed) -> str | None:
    """Why tiles do not fit this weight, or None."""
    rows, columns = weight.shape
    if rows % GROUP or columns % _TILE:
        return f"needs a weight of a multiple of {GROUP} rows and of {_TILE} columns, got {weight.shape}"
    return None


def product(
    dy: Float[Array, "M O"], weight: Packed, update: tuple[Float[Array, "M R"], Float[Array, "I R"]] | None, config: Config
) -> Float[Array, "M I"]:
    """dy W, plus u bᵀ as one more step of the contraction, of 64 columns."""
    rows, (depth, columns) = dy.shape[0], weight.shape
    steps, tile_m = depth // GROUP, COMPUTE * config.block_m
    stages = min(config.stages, steps)
    codes = lax.bitcast_convert_type(weight.codes, jnp.int4).reshape(depth, -1)
    extra = [] if update is None else [whole_tiles(widened(update[0])), widened(update[1])]
    dy = whole_tiles(dy)
    tiles = pl.cdiv(rows, tile_m), columns // _TILE

    def place(at: tuple[Any, Any]) -> tuple[Any, Any]:
        return at[0] * tile_m, at[1]

    def copy(refs: Sequence[Any], at: tuple[Any, Any], tile: Any, **smem: Any) -> None:
        _copy(refs[:-1], place(at), tile_m, steps, stages, tile, **smem)

    def compute(refs: Sequence[Any], at: tuple[Any, Any], tile: Any, wg: Any, **smem: Any) -> None:
        _compute(refs[-1], place(at), tile, steps, stages, bool(extra), wg, config, **smem)

    shape = jax.ShapeDtypeStruct((dy.shape[0], columns), dy.dtype)
    made = launch(copy, compute, shape, _scratch(stages, bool(extra), config), tiles, config)
    return made(dy, codes, weight.scales.T, *extra)[:rows]


def _scratch(stages: int, updated: bool, config: Config) -> dict[str, Any]:
    (wide, narrow), tile_m = (tiled(128), tiled(32)), COMPUTE * config.block_m
    scratch = {
        "dy_smem": plgpu.SMEM((stages, tile_m, GROUP), jnp.bfloat16, transforms=wide),
        "codes_smem": plgpu.SMEM((stages, COMPUTE, GROUP, GROUP), jnp.int4, transforms=narrow),
        "scales_smem": plgpu.SMEM((stages, COMPUTE, GROUP), jnp.bfloat16),
        "decoded_smem": plgpu.SMEM((2, GROUP, _TILE), jnp.bfloat16, transforms=wide),
        "out_smem": plgpu.SMEM((COMPUTE, config.block_m, GROUP), jnp.bfloat16, transforms=wide),
        "full": plgpu.Barrier(num_arrivals=1 + 2 * COMPUTE, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        "decoded": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=2),
    }
    if updated:
        scratch |= {
            "u_smem": plgpu.SMEM((tile_m, GROUP), jnp.bfloat16, transforms=wide),
            "b_smem": plgpu.SMEM((_TILE, GROUP), jnp.bfloat16, transforms=wide),
            "update_full": plgpu.Barrier(num_arrivals=2),
            "update_empty": plgpu.Barrier(num_arrivals=COMPUTE),
        }
    return scratch


def _copy(gmem: Any, place: Any, tile_m: int, steps: int, stages: int, tile: Any, **smem: Any) -> None:
    """The copying warpgroup's part of a tile: fills slots as the others empty them."""
    (first, at_i), (dy, codes, scales, *update) = place, gmem
    rows = pl.ds(first, tile_m)

    def start(k: Any, slot: Any) -> None:
        depth, full = pl.ds(k * GROUP, GROUP), smem["full"].at[slot]
        plgpu.copy_gmem_to_smem(dy.at[rows, depth], smem["dy_smem"].at[slot], full)
        for half in range(COMPUTE):
            group = COMPUTE * at_i + half
            plgpu.copy_gmem_to_smem(codes.at[depth, pl.ds(group * GROUP, GROUP)], smem["codes_smem"].at[slot, half], full)
            plgpu.copy_gmem_to_smem(scales.at[group, depth], smem["scales_smem"].at[slot, half], full)

    fill(steps, stages, tile, smem["empty"], start)
    if update:
        u, b = update

        @pl.when(tile > 0)
        def _() -> None:
            plgpu.barrier_wait(smem["update_empty"])

        plgpu.copy_gmem_to_smem(u.at[rows], smem["u_smem"], smem["update_full"])
        plgpu.copy_gmem_to_smem(b.at[pl.ds(at_i * _TILE, _TILE)], smem["b_smem"], smem["update_full"])


def _compute(out: Any, place: Any, tile: Any, steps: int, stages: int, updated: bool, wg: Any, config: Config, **smem: Any) -> None:
    """A compute warpgroup's part of a tile: its rows of dy, all decoded columns."""
    own = pl.ds(wg * config.block_m, config.block_m)

    def accumulate(acc: Any) -> Any:
        @pl.loop(0, steps)
        def _(k: Any) -> None:
            # Counted through all tiles: with an odd number of steps, a tile would begin with the half that its predecessor ends with.
            slot, half = lax.rem(k, stages), lax.rem(tile * steps + k, 2)
            plgpu.barrier_wait(smem["full"].at[slot])
            w = decode_tile(smem["codes_smem"].at[slot, wg], smem["scales_smem"].at[slot, wg])
            # Nobody reads this half any more: whoever passed the last step's barrier had finished the step before.
            smem["decoded_smem"].at[half, :, pl.ds(wg * GROUP, GROUP)][...] = w
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem["decoded"].at[half])
            plgpu.barrier_wait(smem["decoded"].at[half])
            plgpu.wgmma(acc, smem["dy_smem"].at[slot, own], smem["decoded_smem"].at[half])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(smem["empty"].at[slot])

        if updated:
            plgpu.barrier_wait(smem["update_full"])
            plgpu.wgmma(acc, smem["u_smem"].at[own], smem["b_smem"].T)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(smem["update_empty"])
        return acc[...].astype(jnp.bfloat16)

    value = pl.run_scoped(accumulate, accumulator(config.block_m, _TILE))
    first, at_i = place
    rows = pl.ds(first + wg * config.block_m, config.block_m)
    for half in range(COMPUTE):
        # The copy before has left shared memory.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem["out_smem"].at[wg][...] = value[:, half * GROUP : (half + 1) * GROUP]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem["out_smem"].at[wg], out.at[rows, pl.ds(at_i * _TILE + half * GROUP, GROUP)])
