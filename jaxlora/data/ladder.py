"""The few shapes that a run compiles: at most 8 pairs (tokens a row, patches a micro-batch), chosen before the first step."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxlora.data.order import row_order

# One patch through the tower costs about a quarter of one token through the text model (0.1 at 7B, 0.45 at 2B, Qwen2-VL).
PATCH_COST = 0.25
_CANDIDATES = 24
_STEPS_TRIED = 2048


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
    """The static sizes of a step: S tokens a row, V vision patches a data shard of one micro-batch; and the patches of every frame, where a
    run's frames are all alike."""

    tokens: int
    patches: int = 0
    frame: int | None = dataclasses.field(default=None, repr=False)

    def holds(self, tokens: int, patches: int) -> bool:
        """Whether a step of this size fits.

        >>> Shape(128, 0).holds(100, 4)
        False
        """
        return tokens <= self.tokens and patches <= self.patches

    def cost(self, rows: int) -> float:
        """Work of one micro-batch shard, in tokens."""
        return rows * self.tokens + PATCH_COST * self.patches


def ladder(
    lengths: Sequence[tuple[int, int]],
    *,
    rows: int = 1,
    shards_per_step: int = 1,
    merge: int = 2,
    most: int = 8,
    frame: int | None = None,
) -> tuple[Shape, ...]:
    """Chooses at most ``most`` shapes for rows of (tokens, patches), smallest first; the last holds any step that can occur.

    Steps of ``shards_per_step`` groups (micro-batches x data shards) of ``rows`` rows are drawn as in training; starting
    from the largest shape, the shape that saves most work is added until none saves 1 %. Sizes are multiples of 128 tokens and
    64·merge² patches, or 16 and 4·merge² when everything is small; of patches, of ``frame`` where all frames have so many. The same
    lengths always give the same ladder.

    >>> ladder([(100, 0), (90, 0), (500, 0), (510, 0)])
    (Shape(tokens=96, patches=0), Shape(tokens=112, patches=0), Shape(tokens=512, patches=0))

    Raises:
      ValueError: no lengths, or a ``most``, ``rows`` or ``shards_per_step`` below 1.
    """
    if not lengths or min(most, rows, shards_per_step) < 1:
        raise ValueError(
            f"a ladder needs at least one row, and rows, shards_per_step and most of at least 1; got {len(lengths)} lengths, "
            f"rows={rows}, shards_per_step={shards_per_step}, most={most}"
        )
    table = np.asarray(lengths, np.int64).reshape(-1, 2)
    needs = _needs_of_steps(table, rows, shards_per_step)
    top = np.array([table[:, 0].max(), np.sort(table[:, 1])[-rows:].sum()])
    units = _units(top, merge, frame)
    rounded = -(-needs // units) * units
    top = np.maximum(-(-top // units) * units, units * (top > 0))
    candidates = _candidates(np.concatenate([rounded, top[None]]))
    costs = candidates @ np.array([rows, PATCH_COST])
    holds = (candidates[None] >= rounded[:, None]).all(-1)
    chosen = [top]
    current = np.full(len(rounded), float(top @ np.array([rows, PATCH_COST])))
    while len(chosen) < most:
        totals = np.where(holds, np.minimum(costs[None], current[:, None]), current[:, None]).sum(0)
        best = int(totals.argmin())
        if totals[best] > 0.99 * current.sum():
            break
        chosen.append(candidates[best])
        current = np.where(holds[:, best], np.minimum(costs[best], current), current)
    return tuple(sorted({Shape(int(tokens), int(patches), frame) for tokens, patches in chosen}))


def smallest_that_holds(shapes: Sequence[Shape], tokens: int, patches: int = 0, *, rows: int = 1) -> Shape:
    """The cheapest shape that fits; the first of equals.

    >>> smallest_that_holds([Shape(128, 0), Shape(256, 0)], 130)
    Shape(tokens=256, patches=0)

    Raises:
      ValueError: none fits.
    """
    fits = [shape for shape in shapes if shape.holds(tokens, patches)]
    if not fits:
        raise ValueError(
            f"no shape holds {tokens} tokens and {patches} patches; the ladder is {list(shapes)}; is this row of another dataset?"
        )
    return min(fits, key=lambda shape: (shape.cost(rows), shape))


def padding_waste(shapes: Sequence[Shape], lengths: Sequence[tuple[int, int]], *, rows: int = 1, shards_per_step: int = 1) -> float:
    """The share of the work (tokens, and patches at ``PATCH_COST``) that is padding when these rows are trained on, 0 to 1.

    >>> padding_waste([Shape(128, 0)], [(64, 0), (128, 0)])
    0.25
    """
    table = np.asarray(lengths, np.int64).reshape(-1, 2)
    needs = _needs_of_steps(table, rows, shards_per_step)
    padded = sum(smallest_that_holds(shapes, int(s), int(v), rows=rows).cost(rows) for s, v in needs) * shards_per_step
    used = sum(_used(table, step) for step in _steps(len(table), rows * shards_per_step))
    return float(1 - used / padded) if padded else 0.0


def _used(table: np.ndarray, step: np.ndarray) -> float:
    return float(table[step, 0].sum() + PATCH_COST * table[step, 1].sum())


def _steps(n: int, size: int) -> list[np.ndarray]:
    order = row_order(n, seed=0, epoch=0)[: size * _STEPS_TRIED]
    return [order[at : at + size] for at in range(0, len(order), size)]


def _needs_of_steps(table: np.ndarray, rows: int, shards_per_step: int) -> np.ndarray:
    """(S, V) of each step: the longest row, and the most patches in any group of ``rows``."""
    needs = []
    for step in _steps(len(table), rows * shards_per_step):
        groups = [table[step[at : at + rows], 1].sum() for at in range(0, len(step), rows)]
        needs.append((table[step, 0].max(), max(groups)))
    return np.array(needs, np.int64)


def frame_size(lengths: Sequence[tuple[int, int]], frames: Sequence[int]) -> int | None:
    """The patches of a frame, where rows of (tokens, patches) with so many images and video frames have as many in each; else None.

    >>> frame_size([(20, 8), (30, 0), (40, 16)], [1, 0, 2]), frame_size([(20, 8), (40, 12)], [1, 1])
    (8, None)
    """
    sizes = {divmod(patches, count) for (_, patches), count in zip(lengths, frames, strict=True) if count}
    return next(iter(sizes))[0] if len(sizes) == 1 and not next(iter(sizes))[1] else None


def _units(top: np.ndarray, merge: int, frame: int | None) -> np.ndarray:
    tokens = 128 if top[0] > 512 else 16
    patches = 64 * merge**2 if top[1] > 512 * merge**2 else 4 * merge**2
    return np.array([tokens, frame or patches])


def _candidates(rounded: np.ndarray) -> np.ndarray:
    """Pairs of up to 24 values of each size, evenly spread over those that occur."""
    axes = [np.unique(rounded[:, axis]) for axis in (0, 1)]
    axes = [values[np.unique(np.linspace(0, len(values) - 1, _CANDIDATES).round().astype(int))] for values in axes]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
