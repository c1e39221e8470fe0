"""The device code of what surrounds products in e4m3; as `pallas_kernels.triton_code`, it imports nothing but Triton besides that."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from pallas_kernels.triton_code import activate, adapted_tile, rank_columns, row_scales, transposed_columns, weight_tile


@triton.jit
def scale_of(largest):
    """largest / 448, e4m3's largest number; 1 of zeros."""
    return tl.where(largest > 0, largest * (1.0 / 448.0), 1.0)


@triton.jit
def whole_rows(x, rows, row_kept, N: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of x [M, N] in fp32, with zeros beyond their columns."""
    columns = tl.arange(0, BLOCK)
    at = rows[:, None].to(tl.int64) * N + columns[None]
    return tl.load(x + at, mask=row_kept[:, None] & (columns < N)[None], other=0.0).to(tl.float32)


@triton.jit
def put_rows(out, value, rows, row_kept, first, WIDTH: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of out [M, WIDTH]: N columns of them from ``first`` on."""
    columns = tl.arange(0, BLOCK)
    at = rows[:, None].to(tl.int64) * WIDTH + first + columns[None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=row_kept[:, None] & (columns < N)[None])


@triton.jit
def float8_rows(
    x, y, z, codes, scales,
    M: tl.constexpr, NX: tl.constexpr, NY: tl.constexpr, NZ: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_Z: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """codes [M, NX + NY + NZ] = e4m3(r_i / scales_i), scales [M] = max|r_i| / 448, of the rows r of [x, y, z]; y and z may have no columns.

    A row is one block of each array.
    """
    rows, WIDTH = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), NX + NY + NZ
    row_kept = rows < M
    first = whole_rows(x, rows, row_kept, NX, BLOCK_X)
    second = whole_rows(y, rows, row_kept, NY, BLOCK_Y)
    third = whole_rows(z, rows, row_kept, NZ, BLOCK_Z)
    largest = tl.maximum(tl.max(tl.abs(first), axis=1), tl.maximum(tl.max(tl.abs(second), axis=1), tl.max(tl.abs(third), axis=1)))
    scale = scale_of(largest)
    inverse = (1.0 / scale)[:, None]
    tl.store(scales + rows, scale, mask=row_kept)
    put_rows(codes, first * inverse, rows, row_kept, 0, WIDTH, NX, BLOCK_X)
    put_rows(codes, second * inverse, rows, row_kept, NX, WIDTH, NY, BLOCK_Y)
    put_rows(codes, third * inverse, rows, row_kept, NX + NY, WIDTH, NZ, BLOCK_Z)


@triton.jit
def adapted_activation(
    raw_e, raw_g, e_scales, g_scales, u_e, u_g, b_e, b_g, a, h, u,
    M: tl.constexpr, N: tl.constexpr, R_E: tl.constexpr, R_G: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h [M, N] = act(e) ∘ g of `adapted_tile`s e and g, or act(e + raw_g) of a row raw_g [1, N] where not ``GATED``.

    And u [p, M, R]: the part of h @ aᵀ, a [R, N], over the p-th ``COLUMNS`` columns.
    """
    tiles = tl.cdiv(M, BLOCK_M)
    part, rows = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_kept, ranks = rows < M, tl.arange(0, BLOCK_R)
    dtype: tl.constexpr = h.dtype.element_ty
    e_scale, e_columns = row_scales(e_scales, rows, row_kept), rank_columns(u_e, rows, row_kept, R_E, BLOCK_E)
    g_scale, g_columns = row_scales(g_scales, rows, row_kept), rank_columns(u_g, rows, row_kept, R_G, BLOCK_G)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in tl.range(0, COLUMNS, BLOCK_N, num_stages=STAGES):
        columns = part * COLUMNS + first + tl.arange(0, BLOCK_N)
        column_kept = columns < N
        place, kept = rows[:, None].to(tl.int64) * N + columns[None], row_kept[:, None] & column_kept[None]
        b_tile = transposed_columns(b_e, columns, column_kept, R_E, BLOCK_E)
        value = adapted_tile(raw_e, place, kept, e_scale, e_columns, b_tile)
        if GATED:
            b_tile = transposed_columns(b_g, columns, column_kept, R_G, BLOCK_G)
            times = adapted_tile(raw_g, place, kept, g_scale, g_columns, b_tile)
            made = (activate(value, ACTIVATION) * times).to(dtype)
        else:
            shifted = value + tl.load(raw_g + columns, mask=column_kept, other=0.0).to(tl.float32)[None]
            made = activate(shifted, ACTIVATION).to(dtype)
        tl.store(h + place, made, mask=kept)
        inside = column_kept[:, None] & (ranks < R)[None]
        acc = tl.dot(made, tl.load(a + ranks[None] * N + columns[:, None], mask=inside, other=0.0), acc)
    place = (part * M + rows)[:, None].to(tl.int64) * R + ranks[None]
    tl.store(u + place, acc, mask=row_kept[:, None] & (ranks < R)[None])


@triton.jit
def turn_tile(
    codes, scales, book, layer, inverse, out, band, first,
    M: tl.constexpr, START: tl.constexpr, TOTAL: tl.constexpr, WIDTH: tl.constexpr, FORMAT: tl.constexpr, STACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Columns START + … of out [WIDTH, TOTAL] = (W · inverse)ᵀ: the band-th rows and the columns from ``first`` on of a weight [M, WIDTH].

    Four rows are a word before they are turned: words move between threads four times as fast as single bytes.
    """
    if STACKED:
        codes += tl.load(layer).to(tl.int64) * (M * (WIDTH // 2))
    fours, columns = band * (BLOCK_M // 4) + tl.arange(0, BLOCK_M // 4), first + tl.arange(0, BLOCK_N)
    kept = fours < M // 4
    word = tl.zeros((BLOCK_M // 4, BLOCK_N), tl.uint32)
    for row in tl.static_range(4):
        w = weight_tile(codes, scales, book, 4 * fours + row, kept, first, WIDTH, FORMAT, BLOCK_N, tl.float32) * inverse
        word = word | (w.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.uint32) << (8 * row))
    place = columns[:, None].to(tl.int64) * (TOTAL // 4) + (START // 4 + fours)[None]
    tl.store(out + place, tl.trans(word), mask=(columns < WIDTH)[:, None] & kept[None])


@triton.jit
def float8_transposed(
    x_codes, x_scales, x_book, x_layer, y_codes, y_scales, y_book, y_layer, z_codes, z_scales, z_book, z_layer, factor, out,
    MX: tl.constexpr, MY: tl.constexpr, MZ: tl.constexpr, WIDTH: tl.constexpr, FORMAT: tl.constexpr, STACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [WIDTH, MX + MY + MZ] = (W / factor)ᵀ of weights [M, WIDTH] of whole groups, each element rounded once; Y and Z may have no rows.

    out's elements are words of four. Where ``STACKED``, codes are [layers, M, WIDTH / 2], of which the layer-th are meant.
    """
    tiles, inverse = tl.cdiv(WIDTH, BLOCK_N), 1.0 / tl.load(factor)
    band, first = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BLOCK_N
    TOTAL: tl.constexpr = MX + MY + MZ
    X_BANDS: tl.constexpr = (MX + BLOCK_M - 1) // BLOCK_M
    Y_BANDS: tl.constexpr = (MY + BLOCK_M - 1) // BLOCK_M
    if band < X_BANDS:
        turn_tile(
            x_codes, x_scales, x_book, x_layer, inverse, out, band, first, MX, 0, TOTAL, WIDTH, FORMAT, STACKED, BLOCK_M, BLOCK_N
        )  # fmt: skip
    elif band < X_BANDS + Y_BANDS:
        turn_tile(
            y_codes, y_scales, y_book, y_layer, inverse, out, band - X_BANDS, first,
            MY, MX, TOTAL, WIDTH, FORMAT, STACKED, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        turn_tile(
            z_codes, z_scales, z_book, z_layer, inverse, out, band - X_BANDS - Y_BANDS, first,
            MZ, MX + MY, TOTAL, WIDTH, FORMAT, STACKED, BLOCK_M, BLOCK_N,
        )  # fmt: skip
