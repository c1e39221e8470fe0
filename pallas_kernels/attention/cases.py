"""Named calls of attention, which tests and benchmarks walk."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels._kernel import Case

_TWO_ROWS = ([(0, 5), (5, 9), (14, 4)], [(0, 17)])


def _case(
    dtype: Any,
    *,
    length: int,
    heads: tuple[int, int],
    width: int,
    rows: Sequence[Sequence[tuple[int, int]]],
    sinks: bool = False,
    **static: Any,
) -> Case:
    """``rows`` holds the (start, length) pairs of each row; ``heads`` is (query heads, key heads)."""
    draw = np.random.default_rng(0)
    shapes = {
        "q": (len(rows), length, heads[0], width),
        "k": (len(rows), length, heads[1], width),
        "v": (len(rows), length, heads[1], width),
    }
    arrays: dict[str, Any] = {name: jnp.asarray(draw.standard_normal(shape), dtype) for name, shape in shapes.items()}
    if sinks:
        arrays["sinks"] = jnp.asarray(draw.standard_normal(heads[0]), jnp.float32)
    segments = np.zeros((2, len(rows), max(map(len, rows)) + 1), np.int32)
    for b, row in enumerate(rows):
        for m, pair in enumerate(row):
            segments[:, b, m] = pair
    wrt = tuple(arrays)
    arrays["segments"] = (jnp.asarray(segments[0]), jnp.asarray(segments[1]))
    return Case(arrays=arrays, static=static, wrt=wrt)


def _of(**options: Any) -> functools.partial[Case]:
    return functools.partial(_case, **options)


CASES = {
    "causal": _of(length=18, heads=(4, 2), width=16, rows=_TWO_ROWS, causal=True),
    "bidirectional": _of(length=18, heads=(2, 2), width=8, rows=_TWO_ROWS, causal=False),
    "head_80": _of(length=33, heads=(2, 2), width=80, rows=([(0, 12), (12, 20)], [(0, 30)]), causal=False),
    "head_72": _of(length=33, heads=(3, 1), width=72, rows=([(0, 33)],), causal=True),
    "head_20": _of(length=18, heads=(4, 1), width=20, rows=_TWO_ROWS, causal=True),
    "scale": _of(length=18, heads=(2, 1), width=8, rows=_TWO_ROWS, causal=True, scale=0.5),
    "window": _of(length=18, heads=(2, 1), width=8, rows=_TWO_ROWS, causal=True, window=4),
    "window_bidirectional": _of(length=18, heads=(2, 1), width=8, rows=_TWO_ROWS, causal=False, window=4),
    "softcap": _of(length=18, heads=(2, 1), width=8, rows=_TWO_ROWS, causal=True, softcap=2.0, scale=1.0),
    "sinks": _of(length=18, heads=(4, 2), width=8, rows=_TWO_ROWS, causal=True, sinks=True),
    "everything": _of(length=18, heads=(4, 2), width=8, rows=_TWO_ROWS, causal=True, sinks=True, window=5, softcap=3.0),
    "an_empty_row": _of(length=18, heads=(4, 2), width=16, rows=(_TWO_ROWS[0], []), causal=True),
    "a_late_start": _of(length=24, heads=(2, 1), width=16, rows=([(7, 13)],), causal=True),
    # 600 and 1,100 are more than one block of the blockwise path, and no multiple of it.
    "blocks": _of(length=600, heads=(4, 2), width=16, rows=([(0, 130), (130, 300), (440, 100)], [(3, 590)]), causal=True),
    "blocks_bidirectional": _of(length=1100, heads=(2, 1), width=8, rows=([(0, 520), (520, 64), (600, 500)],), causal=False),
    "blocks_everything": _of(
        length=600, heads=(2, 1), width=8, rows=([(0, 550)], [(10, 40), (50, 550)]), causal=True, sinks=True, window=70, softcap=4.0
    ),
}
