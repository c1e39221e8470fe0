"""The device code of kernels whose programs take whole rows; as `pallas_kernels.triton_code`, it imports nothing but Triton."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def row_starts(rows, width, ALIGNED: tl.constexpr):
    """Where these rows of an array of that width begin. The width is no constant, so that one kernel serves them all."""
    if ALIGNED:
        width = tl.multiple_of(width, 16)
    return rows[:, None].to(tl.int64) * width


@triton.jit
def normed_input(
    x, weight, bias, width, both, statistics,
    M: tl.constexpr, N: tl.constexpr, ALIGNED: tl.constexpr, CENTRED: tl.constexpr, EPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SPARE: tl.constexpr,
):  # fmt: skip
    """both [M, width] = [h, 0] of h = weight · x / rms(x), or weight · (x - mean) / std + bias where ``CENTRED``; a row is one block.

    And statistics [M, 1] = 1 / rms, or [M, 2] = (1 / std, mean), in fp32.
    As XLA has it, the quotient is rounded to the weight's dtype before it is scaled, where it is not centred.
    """
    rows, columns, spare = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), N + tl.arange(0, BLOCK_SPARE)
    row_kept, column_kept = rows < M, columns < N
    kept, at, to = row_kept[:, None] & column_kept[None], rows[:, None].to(tl.int64) * N, row_starts(rows, width, ALIGNED)
    dtype: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + at + columns[None], mask=kept, other=0.0).to(tl.float32)
    scale = tl.load(weight + columns, mask=column_kept, other=0.0)
    KEPT: tl.constexpr = 2 if CENTRED else 1
    if CENTRED:
        mean = tl.sum(value, axis=1) / N
        value = tl.where(kept, value - mean[:, None], 0.0)
        tl.store(statistics + KEPT * rows + 1, mean, mask=row_kept)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / N + EPS)
    tl.store(statistics + KEPT * rows, inverse, mask=row_kept)
    normed = value * inverse[:, None]
    if CENTRED:
        h = (normed * scale.to(tl.float32)[None] + tl.load(bias + columns, mask=column_kept, other=0.0).to(tl.float32)[None]).to(dtype)
    else:
        h = (normed.to(scale.dtype) * scale[None]).to(dtype)
    tl.store(both + to + columns[None], h, mask=kept)
    tl.store(both + to + spare[None], tl.zeros((BLOCK_M, BLOCK_SPARE), dtype), mask=row_kept[:, None] & (spare < width)[None])


@triton.jit
def norm_gradient(
    x, weight, dy, past, dx,
    M: tl.constexpr, N: tl.constexpr, CENTRED: tl.constexpr, EPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx [M, N] = past + (g - n · mean(g · n)) / rms(x), n = x / rms(x), g = weight · dy; ``CENTRED``: n = (x - mean) / std, less mean(g).

    A row is one block.
    """
    rows, columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    kept, at = (rows < M)[:, None] & (columns < N)[None], rows[:, None].to(tl.int64) * N + columns[None]
    value = tl.load(x + at, mask=kept, other=0.0).to(tl.float32)
    g = tl.load(dy + at, mask=kept, other=0.0).to(tl.float32)
    g *= tl.load(weight + columns, mask=columns < N, other=0.0).to(tl.float32)[None]
    if CENTRED:
        value = tl.where(kept, value - (tl.sum(value, axis=1) / N)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / N + EPS)
    along = inverse * inverse * (tl.sum(g * value, axis=1) / N)
    if CENTRED:
        g -= (tl.sum(g, axis=1) / N)[:, None]
    total = tl.load(past + at, mask=kept, other=0.0).to(tl.float32) + inverse[:, None] * (g - value * along[:, None])
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=kept)


@triton.jit
def logsumexp(t, out, N: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr):
    """out [M] = log Σ exp(t) of each row of t [M, N], in one pass: the largest so far and the sum relative to that, for each place of a
    block, which are joined at the end.

    exp(x) is 2 to the x / log 2, which the hardware has.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    # Finite: the difference of two infinities is no number.
    LEAST: tl.constexpr = -3.4028234663852886e38
    largest, total = tl.full((BLOCK_N,), LEAST, tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for first in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        columns = first + tl.arange(0, BLOCK_N)
        value = tl.load(t + row * N + columns, mask=columns < N, other=LEAST)
        larger = tl.maximum(largest, value)
        total = total * tl.exp2(LOG2_E * (largest - larger)) + tl.exp2(LOG2_E * (value - larger))
        largest = larger
    top = tl.max(largest, axis=0)
    tl.store(out + row, top + tl.log(tl.sum(total * tl.exp2(LOG2_E * (largest - top)), axis=0)))
