"""The device code of what surrounds products in e4m3; as `pallas_kernels.triton_code`, it imports nothing but Triton besides that."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from pallas_kernels.weight_triton_code import GROUP


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
def permuted(low, high, selector):
    """Four of the bytes of high:low, by the four lowest nibbles of the selector; of a nibble of 8 and more the byte's sign, repeated."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.uint32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def rounded_byte(x):
    """The e4m3 number next to x, as a word."""
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.uint32)


@triton.jit
def four_values(scale, book, FIRST: tl.constexpr, FORMAT: tl.constexpr):
    """e4m3(value · scale) of the codes from ``FIRST`` on, four a word; int4's as far as they are positive."""
    word = tl.zeros(scale.shape, tl.uint32)
    for i in tl.static_range(4):
        value = FIRST + i if FORMAT == "int4" else tl.load(book + FIRST + i)
        word = word | (rounded_byte(scale * value) << (8 * i))
    return word


@triton.jit
def all_values(scale, book, FORMAT: tl.constexpr):
    """e4m3(value · scale) of the 16 codes, four a word."""
    a, b = four_values(scale, book, 0, FORMAT), four_values(scale, book, 4, FORMAT)
    if FORMAT == "int4":
        # -8 to -1: 8 to 1 with the other sign.
        c = permuted(b, rounded_byte(8.0 * scale), 0x1234) ^ 0x80808080
        d = permuted(a, b, 0x1234) ^ 0x80808080
    else:
        c, d = four_values(scale, book, 8, FORMAT), four_values(scale, book, 12, FORMAT)
    return a, b, c, d


@triton.jit
def float8_words(codes, scales, book, inverse, rows, kept, first, WIDTH: tl.constexpr, FORMAT: tl.constexpr, COLUMNS: tl.constexpr):
    """Two times [len(rows), groups, 8]: e4m3(w · inverse) of columns 8 k to 8 k + 3 a word, and of the four after them.

    A group has 16 numbers: they are rounded once, and the codes pick them by bytes, which takes a third of the instructions of rounding
    each. ``codes`` points to bytes.
    """
    SIZE: tl.constexpr = rows.shape[0]
    at, words = rows[:, None].to(tl.int64), first // 8 + tl.arange(0, COLUMNS // 8)
    groups = first // GROUP + tl.arange(0, COLUMNS // GROUP)
    place = codes.to(tl.pointer_type(tl.uint32), bitcast=True) + at * (WIDTH // 8) + words[None]
    packed = tl.load(place, mask=kept[:, None] & (words < WIDTH // 8)[None], other=0)
    inside = kept[:, None] & (groups < WIDTH // GROUP)[None]
    scale = tl.load(scales + at * (WIDTH // GROUP) + groups[None], mask=inside, other=0.0).to(tl.float32) * inverse
    packed = tl.reshape(packed, (SIZE, COLUMNS // GROUP, 8))
    a, b, c, d = all_values(scale, book, FORMAT)
    a, b, c, d = a[:, :, None], b[:, :, None], c[:, :, None], d[:, :, None]
    places, upper = packed & 0x77777777, packed & 0x88888888
    # Where a nibble's highest bit is set, the sign of 0x80 repeated; else a zero.
    upper = upper | (upper >> 1)
    return picked(a, b, c, d, places, upper), picked(a, b, c, d, places >> 16, upper >> 16)


@triton.jit
def picked(a, b, c, d, places, upper):
    """Four bytes: by the lowest nibbles of ``places`` of a and b, or where ``upper`` says so of c and d."""
    lower = permuted(a, b, places)
    return lower ^ ((lower ^ permuted(c, d, places)) & permuted(0, 0x80, upper))


@triton.jit
def turned(a, b, c, d):
    """The four columns of four rows' words, each a word."""
    ab, cd = permuted(a, b, 0x5140), permuted(c, d, 0x5140)
    other_ab, other_cd = permuted(a, b, 0x7362), permuted(c, d, 0x7362)
    first, second = permuted(ab, cd, 0x5410), permuted(ab, cd, 0x7632)
    return first, second, permuted(other_ab, other_cd, 0x5410), permuted(other_ab, other_cd, 0x7632)


@triton.jit
def float8_weight(
    codes, scales, book, layer, factor, out,
    M: tl.constexpr, WIDTH: tl.constexpr, FORMAT: tl.constexpr, STACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [M, WIDTH] = W / factor of a weight [M, WIDTH] of whole groups, each element rounded once. out's elements are words of four.

    Where ``STACKED``, codes are [layers, M, WIDTH / 2], of which the layer-th are meant.
    """
    tiles, inverse = tl.cdiv(WIDTH, BLOCK_N), 1.0 / tl.load(factor)
    rows, first = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M), (tl.program_id(0) % tiles) * BLOCK_N
    if STACKED:
        codes += tl.load(layer).to(tl.int64) * (M * (WIDTH // 2))
    a, b = float8_words(codes, scales, book, inverse, rows, rows < M, first, WIDTH, FORMAT, BLOCK_N)
    words = first // 4 + tl.arange(0, BLOCK_N // 4)
    place = rows[:, None].to(tl.int64) * (WIDTH // 4) + words[None]
    tl.store(out + place, tl.reshape(tl.join(a, b), (BLOCK_M, BLOCK_N // 4)), mask=(rows < M)[:, None] & (words < WIDTH // 4)[None])


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
    a, e = float8_words(codes, scales, book, inverse, 4 * fours, kept, first, WIDTH, FORMAT, BLOCK_N)
    b, f = float8_words(codes, scales, book, inverse, 4 * fours + 1, kept, first, WIDTH, FORMAT, BLOCK_N)
    c, g = float8_words(codes, scales, book, inverse, 4 * fours + 2, kept, first, WIDTH, FORMAT, BLOCK_N)
    d, h = float8_words(codes, scales, book, inverse, 4 * fours + 3, kept, first, WIDTH, FORMAT, BLOCK_N)
    a, b, c, d = turned(a, b, c, d)
    e, f, g, h = turned(e, f, g, h)
    # What is joined last is next to each other: a to h are the columns in order.
    even, odd = tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h))
    word = tl.reshape(tl.join(even, odd), (BLOCK_M // 4, BLOCK_N))
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
