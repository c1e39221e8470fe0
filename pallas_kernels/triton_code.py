"""The device code of what adapted products take and give: activations, their gradients, adapters' parts; imports Triton alone, so that its
interpreter can run it anywhere.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), by the square of an inverse root: with a division and `tl.exp` it takes three times as many instructions."""
    root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * x))
    return root * root


@triton.jit
def activate(e, ACTIVATION: tl.constexpr):
    """silu, or gelu by its exact form, tanh's or the sigmoid's approximation, of an fp32 tile."""
    if ACTIVATION == "silu":
        h = e * sigmoid(e)
    elif ACTIVATION == "quick_gelu":
        h = e * sigmoid(1.702 * e)
    elif ACTIVATION == "gelu":
        h = 0.5 * e * (1.0 + tl.erf(e * 0.7071067811865476))
    else:
        # 1 + tanh(z) = 2 sigmoid(2 z)
        h = e * sigmoid(1.5957691216057308 * (e + 0.044715 * e * e * e))
    return h


@triton.jit
def activate_with_slope(e, ACTIVATION: tl.constexpr):
    """(act(e), act'(e)) of an fp32 tile."""
    if ACTIVATION == "silu":
        s = sigmoid(e)
        a = e * s
        slope = s + a * (1.0 - s)
    elif ACTIVATION == "quick_gelu":
        s = sigmoid(1.702 * e)
        a = e * s
        slope = s + 1.702 * a * (1.0 - s)
    elif ACTIVATION == "gelu":
        s = 0.5 * (1.0 + tl.erf(e * 0.7071067811865476))
        a, slope = e * s, s + e * 0.3989422804014327 * tl.exp(-0.5 * e * e)
    else:
        s = sigmoid(1.5957691216057308 * (e + 0.044715 * e * e * e))
        a, slope = e * s, s + e * s * (1.0 - s) * (1.5957691216057308 + 0.21406447660469283 * e * e)
    return a, slope


@triton.jit
def transposed_columns(u, rows, kept, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """[BLOCK_R, len(rows)] of an array u [·, R]."""
    columns = tl.arange(0, BLOCK_R)
    return tl.load(u + rows[None, :].to(tl.int64) * R + columns[:, None], mask=kept[None, :] & (columns < R)[:, None], other=0.0)


@triton.jit
def rank_columns(u, rows, kept, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """[len(rows), BLOCK_R] of an array u [·, R]."""
    columns = tl.arange(0, BLOCK_R)
    return tl.load(u + rows[:, None].to(tl.int64) * R + columns[None], mask=kept[:, None] & (columns < R)[None], other=0.0)


@triton.jit
def row_tile(a, columns, kept, N: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """[BLOCK_R, len(columns)] of an array a [R, N]."""
    ranks = tl.arange(0, BLOCK_R)
    return tl.load(a + ranks[:, None] * N + columns[None], mask=(ranks < R)[:, None] & kept[None], other=0.0)


@triton.jit
def store_sum(out, acc, split, columns, kept, N: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, TURNED: tl.constexpr):
    """out[split] [R, N], or where ``TURNED`` [N, R], at these columns."""
    ranks = tl.arange(0, BLOCK_R)
    rank_stride, column_stride = (1, R) if TURNED else (N, 1)
    place = (split * N * R).to(tl.int64) + ranks[:, None] * rank_stride + columns[None].to(tl.int64) * column_stride
    tl.store(out + place, acc, mask=(ranks < R)[:, None] & kept[None])


@triton.jit
def row_scales(scales, rows, kept, SCALED: tl.constexpr):
    """[len(rows), 1] of scales [·]; 1 where nothing is ``SCALED``."""
    if SCALED:
        scale = tl.load(scales + rows, mask=kept, other=0.0)[:, None]
    else:
        scale = 1.0
    return scale


@triton.jit
def adapted_tile(z, place, kept, scale, u, b, SCALED: tl.constexpr):
    """A tile of z + u @ b, in fp32; of scale ∘ z + u @ b where ``SCALED``."""
    value = tl.load(z + place, mask=kept, other=0.0).to(tl.float32)
    if SCALED:
        value *= scale
    return tl.dot(u, b, value)


@triton.jit
def gated_gradients(
    e, g, dh, u_gate, u_up, du, a, scales, e_scales, g_scales, b_gate, b_up, de, dg, db_gate, db_up, da,
    M: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr, UNADAPTED: tl.constexpr, UNSCALED: tl.constexpr, R_GATE: tl.constexpr, R_UP: tl.constexpr, R_DOWN: tl.constexpr,
    BLOCK_GATE: tl.constexpr, BLOCK_UP: tl.constexpr, BLOCK_DOWN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """de, dg [M, N] of h = act(e) ∘ g under dh + du @ a, the rows of dh times scales where ``SCALED``. With a ``STRIDE`` of more than N, dg
    goes beside de.

    And for part p of the rows: deᵀ u_gate, dgᵀ u_up [p, N, R], duᵀ h [p, R, N]. Where ``UNADAPTED``, e and g are yet to be made of the
    products in their places, `adapted_tile`s of u_gate and b_gate [N, R], u_up and b_up, with e_scales and g_scales where ``UNSCALED``.
    """
    tiles = tl.cdiv(N, BLOCK_N)
    split, columns = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_kept = columns < N
    dtype: tl.constexpr = e.dtype.element_ty
    gate, up = tl.zeros((BLOCK_GATE, BLOCK_N), tl.float32), tl.zeros((BLOCK_UP, BLOCK_N), tl.float32)
    down, a_tile = tl.zeros((BLOCK_DOWN, BLOCK_N), tl.float32), row_tile(a, columns, column_kept, N, R_DOWN, BLOCK_DOWN)
    gate_tile = transposed_columns(b_gate, columns, column_kept & UNADAPTED, R_GATE, BLOCK_GATE)
    up_tile = transposed_columns(b_up, columns, column_kept & UNADAPTED, R_UP, BLOCK_UP)
    for first in tl.range(0, ROWS, BLOCK_M, num_stages=STAGES):
        rows = split * ROWS + first + tl.arange(0, BLOCK_M)
        row_kept = rows < M
        place, kept = rows[:, None].to(tl.int64) * N + columns[None], row_kept[:, None] & column_kept[None]
        written = rows[:, None].to(tl.int64) * STRIDE + columns[None]
        if UNADAPTED:
            gate_u, up_u = rank_columns(u_gate, rows, row_kept, R_GATE, BLOCK_GATE), rank_columns(u_up, rows, row_kept, R_UP, BLOCK_UP)
            value = adapted_tile(e, place, kept, row_scales(e_scales, rows, row_kept, UNSCALED), gate_u, gate_tile, UNSCALED)
            times = adapted_tile(g, place, kept, row_scales(g_scales, rows, row_kept, UNSCALED), up_u, up_tile, UNSCALED)
        else:
            value = tl.load(e + place, mask=kept, other=0.0).to(tl.float32)
            times = tl.load(g + place, mask=kept, other=0.0).to(tl.float32)
        # Accumulated, and du loaded twice: either saves moving a tile between layouts of registers.
        dvalue = tl.load(dh + place, mask=kept, other=0.0).to(tl.float32)
        if SCALED:
            dvalue *= row_scales(scales, rows, row_kept, SCALED)
        dvalue = tl.dot(rank_columns(du, rows, row_kept, R_DOWN, BLOCK_DOWN), a_tile, dvalue)
        activated, slope = activate_with_slope(value, ACTIVATION)
        de_tile = (dvalue * times * slope).to(dtype)
        dg_tile = (dvalue * activated).to(dtype)
        tl.store(de + written, de_tile, mask=kept)
        tl.store((dg if STRIDE == N else de + N) + written, dg_tile, mask=kept)
        gate = tl.dot(transposed_columns(u_gate, rows, row_kept, R_GATE, BLOCK_GATE), de_tile, gate)
        up = tl.dot(transposed_columns(u_up, rows, row_kept, R_UP, BLOCK_UP), dg_tile, up)
        # The zero keeps Triton from making h once more, its sigmoid too, in the layout of a dot's operand.
        h = (activated * times + 0.0 * dvalue).to(dtype)
        down = tl.dot(transposed_columns(du, rows, row_kept, R_DOWN, BLOCK_DOWN), h, down)
    store_sum(db_gate, gate, split, columns, column_kept, N, R_GATE, BLOCK_GATE, True)
    store_sum(db_up, up, split, columns, column_kept, N, R_UP, BLOCK_UP, True)
    store_sum(da, down, split, columns, column_kept, N, R_DOWN, BLOCK_DOWN, False)


@triton.jit
def plain_gradients(
    e, bias, dh, u, du, a, scales, e_scales, b, de, db, da,
    M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr, UNADAPTED: tl.constexpr, UNSCALED: tl.constexpr, R_UP: tl.constexpr, R_DOWN: tl.constexpr,
    BLOCK_UP: tl.constexpr, BLOCK_DOWN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """de [M, N] of h = act(e + bias) under dh, or where ``SCALED`` its `adapted_tile`s with scales, du and a [R, N].

    And for part p of the rows: deᵀ u [p, N, R], duᵀ h [p, R, N]. Where ``UNADAPTED``, e is yet to be made of the product in its place, an
    `adapted_tile` of u and b [N, R], with e_scales where ``UNSCALED``.
    """
    tiles = tl.cdiv(N, BLOCK_N)
    split, columns = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_kept = columns < N
    dtype: tl.constexpr = e.dtype.element_ty
    shift = tl.load(bias + columns, mask=column_kept, other=0.0)
    up, down = tl.zeros((BLOCK_UP, BLOCK_N), tl.float32), tl.zeros((BLOCK_DOWN, BLOCK_N), tl.float32)
    b_tile = transposed_columns(b, columns, column_kept & UNADAPTED, R_UP, BLOCK_UP)
    a_tile = row_tile(a, columns, column_kept & SCALED, N, R_DOWN, BLOCK_DOWN)
    for first in tl.range(0, ROWS, BLOCK_M, num_stages=STAGES):
        rows = split * ROWS + first + tl.arange(0, BLOCK_M)
        row_kept = rows < M
        place, kept = rows[:, None].to(tl.int64) * N + columns[None], row_kept[:, None] & column_kept[None]
        if UNADAPTED:
            u_tile = rank_columns(u, rows, row_kept, R_UP, BLOCK_UP)
            product = adapted_tile(e, place, kept, row_scales(e_scales, rows, row_kept, UNSCALED), u_tile, b_tile, UNSCALED)
            value = product + shift.to(tl.float32)[None]
        else:
            value = (tl.load(e + place, mask=kept, other=0.0) + shift[None]).to(tl.float32)
        if SCALED:
            du_tile = rank_columns(du, rows, row_kept, R_DOWN, BLOCK_DOWN)
            dvalue = adapted_tile(dh, place, kept, row_scales(scales, rows, row_kept, True), du_tile, a_tile, True)
        else:
            dvalue = tl.load(dh + place, mask=kept, other=0.0).to(tl.float32)
        activated, slope = activate_with_slope(value, ACTIVATION)
        de_tile = (dvalue * slope).to(dtype)
        tl.store(de + place, de_tile, mask=kept)
        up = tl.dot(transposed_columns(u, rows, row_kept, R_UP, BLOCK_UP), de_tile, up)
        down = tl.dot(transposed_columns(du, rows, row_kept, R_DOWN, BLOCK_DOWN), activated.to(dtype), down)
    store_sum(db, up, split, columns, column_kept, N, R_UP, BLOCK_UP, True)
    store_sum(da, down, split, columns, column_kept, N, R_DOWN, BLOCK_DOWN, False)


@triton.jit
def activated_input(
    e, g, a, both, u,
    M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The first N columns h of both [M, WIDTH], h = act(e) ∘ g, or act(e + g) of a row g [1, N] where not ``GATED``.

    And u [p, M, R]: the part of h @ aᵀ, a [R, N], over the p-th ``COLUMNS`` columns; summed up as a @ hᵀ.
    """
    tiles = tl.cdiv(M, BLOCK_M)
    part, rows = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_kept, ranks = rows < M, tl.arange(0, BLOCK_R)
    dtype: tl.constexpr = e.dtype.element_ty
    acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for first in range(0, COLUMNS, BLOCK_N):
        columns = part * COLUMNS + first + tl.arange(0, BLOCK_N)
        column_kept = columns < N
        place, kept = rows[:, None].to(tl.int64) * N + columns[None], row_kept[:, None] & column_kept[None]
        value = tl.load(e + place, mask=kept, other=0.0)
        if GATED:
            h = activate(value.to(tl.float32), ACTIVATION).to(dtype) * tl.load(g + place, mask=kept, other=0.0)
        else:
            shifted = value + tl.load(g + columns, mask=column_kept, other=0.0)[None]
            h = activate(shifted.to(tl.float32), ACTIVATION).to(dtype)
        tl.store(both + rows[:, None].to(tl.int64) * WIDTH + columns[None], h, mask=kept)
        acc = tl.dot(row_tile(a, columns, column_kept, N, R, BLOCK_R), tl.trans(h), acc)
    place = (part * M + rows)[None].to(tl.int64) * R + ranks[:, None]
    tl.store(u + place, acc, mask=row_kept[None] & (ranks < R)[:, None])


@triton.jit
def adapted_activation(
    raw_e, raw_g, e_scales, g_scales, u_e, u_g, b_e, b_g, a, h, u,
    M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, R_E: tl.constexpr, R_G: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    SCALED: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The first N columns of h [M, WIDTH]: act(e) ∘ g of `adapted_tile`s e and g, or act(e + raw_g) of a row raw_g [1, N] if not ``GATED``.

    And u [p, M, R]: the part of h @ aᵀ, a [R, N], over the p-th ``COLUMNS`` columns.
    """
    tiles = tl.cdiv(M, BLOCK_M)
    part, rows = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_kept, ranks = rows < M, tl.arange(0, BLOCK_R)
    dtype: tl.constexpr = h.dtype.element_ty
    e_scale, e_columns = row_scales(e_scales, rows, row_kept, SCALED), rank_columns(u_e, rows, row_kept, R_E, BLOCK_E)
    g_scale, g_columns = row_scales(g_scales, rows, row_kept, SCALED), rank_columns(u_g, rows, row_kept, R_G, BLOCK_G)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in tl.range(0, COLUMNS, BLOCK_N, num_stages=STAGES):
        columns = part * COLUMNS + first + tl.arange(0, BLOCK_N)
        column_kept = columns < N
        place, kept = rows[:, None].to(tl.int64) * N + columns[None], row_kept[:, None] & column_kept[None]
        b_tile = transposed_columns(b_e, columns, column_kept, R_E, BLOCK_E)
        value = adapted_tile(raw_e, place, kept, e_scale, e_columns, b_tile, SCALED)
        if GATED:
            b_tile = transposed_columns(b_g, columns, column_kept, R_G, BLOCK_G)
            times = adapted_tile(raw_g, place, kept, g_scale, g_columns, b_tile, SCALED)
            made = (activate(value, ACTIVATION) * times).to(dtype)
        else:
            shifted = value + tl.load(raw_g + columns, mask=column_kept, other=0.0).to(tl.float32)[None]
            made = activate(shifted, ACTIVATION).to(dtype)
        tl.store(h + rows[:, None].to(tl.int64) * WIDTH + columns[None], made, mask=kept)
        inside = column_kept[:, None] & (ranks < R)[None]
        acc = tl.dot(made, tl.load(a + ranks[None] * N + columns[:, None], mask=inside, other=0.0), acc)
    place = (part * M + rows)[:, None].to(tl.int64) * R + ranks[None]
    tl.store(u + place, acc, mask=row_kept[:, None] & (ranks < R)[None])


@triton.jit
def adapted_sum(
    z, scales, u, b, y,
    M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y [M, N], an `adapted_tile` of z [M, WIDTH], scales [M] where ``SCALED``, u [M, R] and b [N, R].

    A program walks ``COLUMNS`` columns.
    """
    tiles = tl.cdiv(M, BLOCK_M)
    part, rows = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_kept = rows < M
    scale, u_tile = row_scales(scales, rows, row_kept, SCALED), rank_columns(u, rows, row_kept, R, BLOCK_R)
    for first in tl.range(0, COLUMNS, BLOCK_N, num_stages=STAGES):
        columns = part * COLUMNS + first + tl.arange(0, BLOCK_N)
        column_kept = columns < N
        place, kept = rows[:, None].to(tl.int64) * WIDTH + columns[None], row_kept[:, None] & column_kept[None]
        total = adapted_tile(z, place, kept, scale, u_tile, transposed_columns(b, columns, column_kept, R, BLOCK_R), SCALED)
        tl.store(y + rows[:, None].to(tl.int64) * N + columns[None], total.to(y.dtype.element_ty), mask=kept)
