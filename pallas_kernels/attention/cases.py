"""Named calls of attention, which tests and benchmarks walk."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels._kernel import Case
from pallas_kernels.attention.spec import Alike, Intervals

_TWO_ROWS = ([(0, 5), (5, 9), (14, 4)], [(0, 17)])


def _case(
    dtype: Any,
    *,
    length: int,
    heads: tuple[int, int],
    width: int,
    rows: Sequence[Sequence[tuple[int, int]]],
    sinks: bool = False,
    images: Sequence[Sequence[tuple[int, int]]] = (),
    **static: Any,
) -> Case:
    """``rows`` and ``images`` hold (start, length) pairs for each row; ``heads`` is (query heads, key heads)."""
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
    if images:
        reach = np.zeros((len(rows), length), np.int32)
        for b, row in enumerate(images):
            for start, count in row:
                reach[b, start : start + count] = start + count
        arrays["reach"] = jnp.asarray(reach)
    return Case(arrays=arrays, static=static, wrt=wrt)


def _crossing(
    dtype: Any, *, lengths: tuple[int, int], heads: tuple[int, int], width: int, rows: Sequence[Sequence[tuple[int, int, int]]]
) -> Case:
    """``lengths`` are (queries, keys); each row holds (count, start, end): that many queries in turn see the keys from start to end."""
    draw = np.random.default_rng(0)
    shapes = {"q": (lengths[0], heads[0]), "k": (lengths[1], heads[1]), "v": (lengths[1], heads[1])}
    arrays: dict[str, Any] = {name: jnp.asarray(draw.standard_normal((len(rows), *shape, width)), dtype) for name, shape in shapes.items()}
    seen = np.stack([np.repeat(np.array(row)[:, 1:], [count for count, _, _ in row], axis=0) for row in rows])
    intervals = Intervals(jnp.asarray(seen[..., 0], jnp.int32), jnp.asarray(seen[..., 1], jnp.int32))
    return Case(arrays={**arrays, "segments": intervals}, static={"causal": False}, wrt=("q", "k", "v"))


def _alike(dtype: Any, *, count: int, **options: Any) -> Case:
    case = _case(dtype, **options)
    return dataclasses.replace(case, arrays={**case.arrays, "segments": Alike(count)})


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
    "images": _of(length=18, heads=(4, 2), width=8, rows=_TWO_ROWS, causal=True, images=([(1, 3), (8, 4)], [(0, 6), (7, 9)])),
    # A block that is longer than the window, and one that ends with its document though its image goes on.
    "images_window": _of(length=18, heads=(2, 1), width=8, rows=_TWO_ROWS, causal=True, images=([(3, 4)], [(2, 9)]), window=4, softcap=3.0),
    "an_empty_row": _of(length=18, heads=(4, 2), width=16, rows=(_TWO_ROWS[0], []), causal=True),
    "a_late_start": _of(length=24, heads=(2, 1), width=16, rows=([(7, 13)],), causal=True),
    # 600 and 1,100 are more than one block of the blockwise path, and no multiple of it.
    "blocks": _of(length=600, heads=(4, 2), width=16, rows=([(0, 130), (130, 300), (440, 100)], [(3, 590)]), causal=True),
    "blocks_bidirectional": _of(length=1100, heads=(2, 1), width=8, rows=([(0, 520), (520, 64), (600, 500)],), causal=False),
    "blocks_images": _of(
        length=600,
        heads=(2, 1),
        width=8,
        rows=([(0, 130), (130, 400)], [(3, 590)]),
        causal=True,
        images=([(20, 90), (200, 320)], []),
        window=300,
    ),
    "blocks_everything": _of(
        length=600, heads=(2, 1), width=8, rows=([(0, 550)], [(10, 40), (50, 550)]), causal=True, sinks=True, window=70, softcap=4.0
    ),
    "short": _of(length=18, heads=(4, 2), width=16, rows=(_TWO_ROWS[0], [(1, 9), (11, 6)]), causal=False, longest=9),
    "short_causal": _of(length=18, heads=(2, 1), width=8, rows=([(2, 5), (7, 9)], []), causal=True, window=3, longest=12),
    "short_images": _of(
        length=18, heads=(2, 2), width=8, rows=([(0, 5), (5, 9)],), causal=True, images=([(1, 3), (8, 4)],), longest=9, scale=0.5
    ),
    "alike": functools.partial(_alike, count=3, length=96, heads=(2, 2), width=80, rows=([], []), causal=False),
    "alike_causal": functools.partial(_alike, count=2, length=96, heads=(4, 2), width=16, rows=([],), causal=True, sinks=True),
    # Rows that see nothing, what others see, and all; keys shorter and longer than queries.
    "intervals": functools.partial(
        _crossing, lengths=(18, 7), heads=(4, 2), width=16, rows=([(3, 0, 0), (5, 0, 4), (10, 2, 7)], [(18, 5, 5)])
    ),
    "blocks_intervals": functools.partial(
        _crossing, lengths=(70, 1100), heads=(2, 1), width=8, rows=([(9, 3, 3), (40, 0, 600), (21, 520, 1100)],)
    ),
    "blocks_of_queries": functools.partial(_crossing, lengths=(1030, 40), heads=(2, 1), width=8, rows=([(514, 0, 9), (516, 0, 40)],)),
}
