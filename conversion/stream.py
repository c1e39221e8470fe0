"""A checkpoint's tensors one at a time, under the model's paths, in the order in which they lie on disk."""

from collections.abc import Iterator

import numpy as np

from conversion._faults import describe, nearest, raise_all
from conversion.formats import bnb
from conversion.rules import Plan
from conversion.safetensors_io import Checkpoint


def stream(checkpoint: Checkpoint, plan: Plan) -> Iterator[tuple[str, np.ndarray | bnb.QuantizedTensor | bnb.Int8Tensor]]:
    """Yields every placed path once, each shard being read once from front to back; only one tensor is in memory.

    A weight with bitsandbytes companions comes as one record, wherever in the checkpoint they are. A tied path is not yielded:
    it is the same array as the path that ``plan.tied`` gives.

    Raises:
      ValueError: before the first tensor, if the plan names tensors that the checkpoint lacks (it was made for another one);
        or as ``bnb.decode``.
    """
    paths = {name: path for path, name in plan.placed.items()}
    needed = [*paths, *(name for parts in plan.companions.values() for name in parts.values())]
    lacking = [name for name in needed if name not in checkpoint.tensors]
    raise_all(
        f"the plan names {len(lacking)} of {len(needed)} tensors that {checkpoint.folder} lacks",
        describe(lacking, lambda name: f"{name!r}{nearest(name, checkpoint.tensors)}"),
    )
    return _stream(checkpoint, plan, paths)


def _stream(checkpoint: Checkpoint, plan: Plan, paths: dict[str, str]) -> Iterator:
    order = sorted(paths, key=lambda name: (checkpoint.info(name).file, checkpoint.info(name).offset))
    for name in order:
        weight, parts = checkpoint.read(name), plan.companions.get(paths[name])
        if parts is None:
            yield paths[name], weight
        else:
            yield paths[name], bnb.decode(name, weight, {suffix: checkpoint.read(part) for suffix, part in parts.items()})
        # Lets go before the next is read.
        del weight
    assert len(order) == len(plan.placed), "two paths of a plan share one tensor"
