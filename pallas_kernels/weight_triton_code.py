"""The device code of products with packed weights; imports Triton alone, so that its interpreter can run it anywhere.

A weight is a tile of 64-column groups: uint8 codes [O, I'/2] (low nibble = even column) with scales [O, I'/64], I' being ``width`` rounded
up to 64, or a dense array [O, width]. Its tile is decoded in registers and rounded once to the dtype of the products.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from pallas_kernels.triton_code import activate

GROUP = tl.constexpr(64)


@triton.jit
def int4_value(code):
    """The two's complement number in the low nibble of a word, in fp32: the last digit of 2²³ + 8 plus it, where a conversion is slower."""
    return ((code & 15) ^ 0x4B000008).to(tl.float32, bitcast=True) - 8388616.0


@triton.jit
def weight_tile(codes, scales, book, rows, kept, first, width, FORMAT: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr):
    """[len(rows), COLUMNS] of a weight from column ``first`` on; zero in rows that are not ``kept`` and beyond the width."""
    SIZE: tl.constexpr = rows.shape[0]
    at = rows[:, None].to(tl.int64)
    if FORMAT == "dense":
        columns = first + tl.arange(0, COLUMNS)
        w = tl.load(codes + at * width + columns[None], mask=kept[:, None] & (columns < width)[None], other=0.0)
    else:
        groups = (width + GROUP - 1) // GROUP
        pairs = first // 2 + tl.arange(0, COLUMNS // 2)
        number = first // GROUP + tl.arange(0, COLUMNS // GROUP)
        inside = kept[:, None] & (pairs < groups * (GROUP // 2))[None]
        packed = tl.load(codes + at * (groups * (GROUP // 2)) + pairs[None], mask=inside, other=0)
        if FORMAT == "int4":
            both = tl.join(int4_value(packed.to(tl.uint32)), int4_value(packed.to(tl.uint32) >> 4))
        else:
            both = tl.join(tl.load(book + (packed & 15)), tl.load(book + (packed >> 4)))
        scale = tl.load(scales + at * groups + number[None], mask=kept[:, None] & (number < groups)[None], other=0.0)
        grouped = tl.reshape(both, (SIZE, COLUMNS // GROUP, GROUP)) * scale.to(tl.float32)[:, :, None]
        w = tl.reshape(grouped, (SIZE, COLUMNS)).to(dtype)
    return w


@triton.jit
def program_tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """(row tile, column tile) of this program: bands of ``BAND`` row tiles, so that neighbours in time share a weight tile."""
    program, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = program // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    inside = program % (BAND * tiles_n)
    return band * BAND + inside % height, inside // height


@triton.jit
def low_rank(acc, left, right, left_rows, left_kept, right_rows, right_kept, R, BLOCK_R: tl.constexpr):
    """acc + left[left_rows] @ right[right_rows]ᵀ of two arrays [·, R]."""
    columns = tl.arange(0, BLOCK_R)
    inside = columns < R
    a = tl.load(left + left_rows[:, None].to(tl.int64) * R + columns[None], mask=left_kept[:, None] & inside[None], other=0.0)
    b = tl.load(right + right_rows[None, :].to(tl.int64) * R + columns[:, None], mask=right_kept[None, :] & inside[:, None], other=0.0)
    return tl.dot(a, b, acc)


@triton.jit
def matmul(
    x, codes, scales, book, u, b, y,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, FORMAT: tl.constexpr, RANKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] @ Wᵀ + u [M, R] @ bᵀ, W [N, K]; computed transposed, so that the decoded tile is the register operand."""
    tile_m, tile_n = program_tile(M, N, BLOCK_M, BLOCK_N, BAND)
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_kept, column_kept = rows < M, columns < N
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        w = weight_tile(codes, scales, book, columns, column_kept, k, K, FORMAT, BLOCK_K, x.dtype.element_ty)
        xt = tl.load(x + rows[None, :].to(tl.int64) * K + depth[:, None], mask=row_kept[None, :] & (depth < K)[:, None], other=0.0)
        acc = tl.dot(w, xt, acc)
    if RANKED:
        acc = low_rank(acc, b, u, columns, column_kept, rows, row_kept, R, BLOCK_R)
    out = tl.trans(acc).to(y.dtype.element_ty)
    tl.store(y + rows[:, None].to(tl.int64) * N + columns[None], out, mask=row_kept[:, None] & column_kept[None])


@triton.jit
def matmul_t(
    dy, codes, scales, book, u, a, dx,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, FORMAT: tl.constexpr, RANKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """dx [M, N] = dy [M, K] @ W + u [M, R] @ aᵀ, W [K, N], a [N, R]."""
    tile_m, tile_n = program_tile(M, N, BLOCK_M, BLOCK_N, BAND)
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_kept, column_kept = rows < M, columns < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        w = weight_tile(codes, scales, book, depth, depth < K, tile_n * BLOCK_N, N, FORMAT, BLOCK_N, dy.dtype.element_ty)
        g = tl.load(dy + rows[:, None].to(tl.int64) * K + depth[None], mask=row_kept[:, None] & (depth < K)[None], other=0.0)
        acc = tl.dot(g, w, acc)
    if RANKED:
        acc = low_rank(acc, u, a, rows, row_kept, columns, column_kept, R, BLOCK_R)
    tl.store(dx + rows[:, None].to(tl.int64) * N + columns[None], acc.to(dx.dtype.element_ty), mask=row_kept[:, None] & column_kept[None])


@triton.jit
def gated(
    x, gate_codes, gate_scales, gate_book, up_codes, up_scales, up_book, u, gate_b, up_b, h, e, g,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    GATE: tl.constexpr, UP: tl.constexpr, ACTIVATION: tl.constexpr, RANKED: tl.constexpr, SAVED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """h [M, N] = act(e) ∘ g, e = x @ Wᵀ + u @ bᵀ of the gate, g of the up weight; e and g are stored where ``SAVED``.

    e and g are rounded before the product, as two products apart would do. A tile of x is read once for both.
    """
    tile_m, tile_n = program_tile(M, N, BLOCK_M, BLOCK_N, BAND)
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_kept, column_kept = rows < M, columns < N
    gate, up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32), tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        xt = tl.load(x + rows[None, :].to(tl.int64) * K + depth[:, None], mask=row_kept[None, :] & (depth < K)[:, None], other=0.0)
        gate_w = weight_tile(gate_codes, gate_scales, gate_book, columns, column_kept, k, K, GATE, BLOCK_K, x.dtype.element_ty)
        gate = tl.dot(gate_w, xt, gate)
        up_w = weight_tile(up_codes, up_scales, up_book, columns, column_kept, k, K, UP, BLOCK_K, x.dtype.element_ty)
        up = tl.dot(up_w, xt, up)
    if RANKED:
        gate = low_rank(gate, gate_b, u, columns, column_kept, rows, row_kept, R, BLOCK_R)
        up = low_rank(up, up_b, u, columns, column_kept, rows, row_kept, R, BLOCK_R)
    dtype: tl.constexpr = h.dtype.element_ty
    gate_out, up_out = tl.trans(gate).to(dtype), tl.trans(up).to(dtype)
    place, kept = rows[:, None].to(tl.int64) * N + columns[None], row_kept[:, None] & column_kept[None]
    tl.store(h + place, activate(gate_out.to(tl.float32), ACTIVATION).to(dtype) * up_out, mask=kept)
    if SAVED:
        tl.store(e + place, gate_out, mask=kept)
        tl.store(g + place, up_out, mask=kept)
