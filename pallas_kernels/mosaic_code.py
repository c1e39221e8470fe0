"""Mosaic GPU device code (sm90): products whose weights are 4-bit codes, decoded into registers.

Three warpgroups a program: two compute, one starts the copies. A program stays on its multiprocessor and takes output tiles in turn. What
is computed is the transposed product, W x, since the tensor core reads only its left operand from registers.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import _kernel
from pallas_kernels.packed import GROUP, Packed

COMPUTE = 2
# Output columns of a compute warpgroup: the height of one tensor core instruction.
_HEIGHT = 64
_TILE = COMPUTE * _HEIGHT
_ROW = plgpu.Layout.WGMMA.reduce(1)
_H200_MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """``block_m`` rows of x a tile, ``stages`` tiles of x and W in flight; ``band`` tiles in a row share their rows or columns."""

    block_m: int = 128
    stages: int = 4
    band: int = 8
    registers: int = 232

    def __post_init__(self):
        if self.block_m % 8 or not 8 <= self.block_m <= 256 or self.stages < 2:
            raise ValueError(f"{self}: block_m must be a multiple of 8 up to 256, and stages at least 2")


def refuses(x: Array, weights: Sequence[Any]) -> str | None:
    """Why these products cannot run here, or None."""
    if not jax.__version__.startswith("0.11."):
        return f"Mosaic's interfaces were read for jax 0.11, this is {jax.__version__}"
    if x.dtype != jnp.bfloat16:
        return f"needs bfloat16, got {x.dtype}"
    formats = sorted({weight.format if isinstance(weight, Packed) else "dense" for weight in weights})
    if formats != ["int4"]:
        return f"decodes int4 alone (a code book is no arithmetic), got {' and '.join(formats)}"
    return _kernel.device().lacks((9, 0))


def refuses_shape(weight: Packed) -> str | None:
    """Why tiles do not fit this weight, or None."""
    columns = weight.shape[0]
    return f"needs a multiple of {_TILE} output columns, got {columns}" if columns % _TILE else None


def products(
    x: Float[Array, "M I"],
    weights: Sequence[Packed],
    update: tuple[Float[Array, "M R"], Sequence[Float[Array, "O R"]]] | None,
    finish: Callable[..., Sequence[Any]],
    outputs: int,
    config: Config,
) -> list[Float[Array, "M O"]]:
    """finish(W_1 x + b_1 u, W_2 x + b_2 u, …), tile by tile: ``outputs`` arrays [M, O] from fp32 tiles [O, M] of weights of one shape.

    The update is one more step of the contraction, of 64 columns.
    """
    rows, count, columns = x.shape[0], len(weights), weights[0].shape[0]
    steps = weights[0].codes.shape[1] * 2 // GROUP
    stages = min(config.stages, steps)
    x = whole_tiles(jnp.pad(x, ((0, 0), (0, steps * GROUP - x.shape[1]))))
    codes = [lax.bitcast_convert_type(w.codes, jnp.int4).reshape(columns, -1) for w in weights]
    scales = [w.scales.T for w in weights]
    extra = [] if update is None else [whole_tiles(widened(update[0])), *(widened(b) for b in update[1])]
    tiles = pl.cdiv(rows, config.block_m), columns // _TILE

    def operands(refs: Sequence[Any]) -> _Operands:
        return _Operands(refs[0], refs[1 : 1 + count], refs[1 + count : 1 + 2 * count], refs[1 + 2 * count : 1 + 2 * count + len(extra)])

    def place(at: tuple[Any, Any]) -> tuple[Any, Any]:
        return pl.ds(at[0] * config.block_m, config.block_m), at[1] * _TILE

    def copy(refs: Sequence[Any], at: tuple[Any, Any], tile: Any, **smem: Any) -> None:
        _copy(operands(refs), place(at), steps, stages, tile, **smem)

    def compute(refs: Sequence[Any], at: tuple[Any, Any], tile: Any, wg: Any, **smem: Any) -> None:
        _compute(refs[-outputs:], place(at), count, steps, stages, bool(extra), finish, wg, config, **smem)

    shapes = [jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype)] * outputs
    made = launch(copy, compute, shapes, _scratch(count, stages, bool(extra), config), tiles, config)(x, *codes, *scales, *extra)
    return [y[:rows] for y in made]


def launch(copy: Any, compute: Any, shapes: Any, scratch: dict[str, Any], tiles: tuple[int, int], config: Any) -> Any:
    """A kernel as a function of arrays: a program on every multiprocessor takes tiles in turn, each by three warpgroups.

    ``copy(refs, at, tile, **smem)`` runs in one, ``compute(refs, at, tile, wg, **smem)`` in the other two; ``at`` is the tile's place in
    ``tiles``, ``tile`` its number in the program.
    """

    def kernel(*refs: Any, **smem: Any) -> None:
        wg = lax.axis_index("wg")

        @plgpu.nd_loop((tiles[0] * tiles[1],), collective_axes="sm")
        def _(loop: plgpu.NDLoopInfo) -> None:
            at = plgpu.planar_snake(loop.index[0], tiles, 0, config.band)

            @pl.when(wg == COMPUTE)
            def _() -> None:
                plgpu.set_max_registers(40, action="decrease")
                copy(refs, at, loop.local_index, **smem)

            @pl.when(wg < COMPUTE)
            def _() -> None:
                plgpu.set_max_registers(config.registers, action="increase")
                compute(refs, at, loop.local_index, wg, **smem)

        # A program's shared memory must outlive the copies from it.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        kernel,
        out_type=shapes,
        scratch_types=scratch,
        grid=(_multiprocessors(),),
        grid_names=("sm",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )


def fill(steps: int, stages: int, tile: Any, empty: Any, start: Callable[[Any, Any], None]) -> None:
    """Calls ``start(k, slot)`` for each step of a tile, as soon as the compute warpgroups have emptied the slot."""

    @pl.loop(0, steps)
    def _(k: Any) -> None:
        slot = lax.rem(k, stages)

        @pl.when((k >= stages) | (tile > 0))
        def _() -> None:
            plgpu.barrier_wait(empty.at[slot])

        start(k, slot)


@dataclasses.dataclass(frozen=True)
class _Operands:
    """References to global memory: x, each weight's codes and scales, and u and each b where there is an update."""

    x: Any
    codes: Sequence[Any]
    scales: Sequence[Any]
    update: Sequence[Any]


def _scratch(count: int, stages: int, updated: bool, config: Config) -> dict[str, Any]:
    wide, narrow = tiled(128), tiled(32)
    scratch = {
        "x_smem": plgpu.SMEM((stages, config.block_m, GROUP), jnp.bfloat16, transforms=wide),
        "codes_smem": plgpu.SMEM((stages, count, _TILE, GROUP), jnp.int4, transforms=narrow),
        "scales_smem": plgpu.SMEM((stages, count, _TILE), jnp.bfloat16),
        "out_smem": plgpu.SMEM((COMPUTE, config.block_m, _HEIGHT), jnp.bfloat16, transforms=tiled(128)[1:]),
        "full": plgpu.Barrier(num_arrivals=1 + 2 * count, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
    }
    if updated:
        scratch |= {
            "u_smem": plgpu.SMEM((config.block_m, GROUP), jnp.bfloat16, transforms=wide),
            "b_smem": plgpu.SMEM((count, _TILE, GROUP), jnp.bfloat16, transforms=wide),
            "update_full": plgpu.Barrier(num_arrivals=1 + count),
            "update_empty": plgpu.Barrier(num_arrivals=COMPUTE),
        }
    return scratch


def _copy(gmem: _Operands, place: Any, steps: int, stages: int, tile: Any, **smem: Any) -> None:
    """The copying warpgroup's part of a tile: fills slots as the others empty them."""
    rows, first = place
    columns = pl.ds(first, _TILE)

    def start(k: Any, slot: Any) -> None:
        depth, full = pl.ds(k * GROUP, GROUP), smem["full"].at[slot]
        plgpu.copy_gmem_to_smem(gmem.x.at[rows, depth], smem["x_smem"].at[slot], full)
        for i, (codes, scales) in enumerate(zip(gmem.codes, gmem.scales, strict=True)):
            plgpu.copy_gmem_to_smem(codes.at[columns, depth], smem["codes_smem"].at[slot, i], full)
            plgpu.copy_gmem_to_smem(scales.at[k, columns], smem["scales_smem"].at[slot, i], full)

    fill(steps, stages, tile, smem["empty"], start)
    if gmem.update:
        u, *bs = gmem.update

        @pl.when(tile > 0)
        def _() -> None:
            plgpu.barrier_wait(smem["update_empty"])

        plgpu.copy_gmem_to_smem(u.at[rows], smem["u_smem"], smem["update_full"])
        for i, b in enumerate(bs):
            plgpu.copy_gmem_to_smem(b.at[columns], smem["b_smem"].at[i], smem["update_full"])


def _compute(
    out: Sequence[Any], place: Any, count: int, steps: int, stages: int, updated: bool, finish: Any, wg: Any, config: Config, **smem: Any
) -> None:
    """A compute warpgroup's part of a tile: 64 output columns of every weight."""
    own = pl.ds(wg * _HEIGHT, _HEIGHT)

    def accumulate(*sums: Any) -> Sequence[Any]:
        @pl.loop(0, steps)
        def _(k: Any) -> None:
            slot = lax.rem(k, stages)
            plgpu.barrier_wait(smem["full"].at[slot])
            decoded = [decode_tile(smem["codes_smem"].at[slot, i, own], smem["scales_smem"].at[slot, i, own]) for i in range(count)]
            for acc, w in zip(sums, decoded, strict=True):
                plgpu.wgmma(acc, w, smem["x_smem"].at[slot].T)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(smem["empty"].at[slot])

        if updated:
            plgpu.barrier_wait(smem["update_full"])
            for i, acc in enumerate(sums):
                plgpu.wgmma(acc, plgpu.load(smem["b_smem"].at[i, own], layout=plgpu.Layout.WGMMA), smem["u_smem"].T)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(smem["update_empty"])
        return finish(*(acc[...] for acc in sums))

    values = pl.run_scoped(accumulate, *[accumulator(_HEIGHT, config.block_m)] * count)
    rows, first = place
    for value, array in zip(values, out, strict=True):
        # The copy before has left shared memory.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem["out_smem"].at[wg].T[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem["out_smem"].at[wg], array.at[rows, pl.ds(first + wg * _HEIGHT, _HEIGHT)])


def decode_tile(codes: Any, scales: Any) -> Any:
    """code · scale [64, 64] in registers, in bf16: the product is rounded once."""
    numbers = plgpu.layout_cast(plgpu.load(codes, layout=plgpu.Layout.WGMMA_UPCAST_4X), plgpu.Layout.WGMMA).astype(jnp.bfloat16)
    return numbers * lax.broadcast_in_dim(plgpu.load(scales, layout=_ROW), numbers.shape, [0])


def accumulator(rows: int, columns: int) -> Any:
    """fp32 sums in registers."""
    return plgpu.ACC((rows, columns))  # pyright: ignore[reportPrivateImportUsage]


def tiled(swizzle: int) -> tuple[Any, Any]:
    """The layout of a tile of 64 columns in shared memory, whose rows have ``swizzle`` bytes, as the tensor core reads it."""
    tiling, swizzled = plgpu.TilingTransform, plgpu.SwizzleTransform
    return tiling((8, 64)), swizzled(swizzle)  # pyright: ignore[reportAbstractUsage]


def whole_tiles(x: Float[Array, "M I"]) -> Float[Array, "m I"]:
    """x with rows of zeros up to a multiple of 8, in which the copy engine counts."""
    return jnp.pad(x, ((0, -x.shape[0] % 8), (0, 0)))


def widened(x: Float[Array, "N R"]) -> Float[Array, "N 64"]:
    """x with columns of zeros up to 64."""
    return jnp.pad(x, ((0, 0), (0, GROUP - x.shape[1])))


@functools.cache
def _multiprocessors() -> int:
    return jax.devices()[0].core_count if jax.default_backend() == "gpu" else _H200_MULTIPROCESSORS
