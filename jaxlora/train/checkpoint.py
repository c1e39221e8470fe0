"""Resumable checkpoints: what is trained, the optimizer, the step and the data position. Never the frozen base.

A folder ``checkpoint-N`` that exists is complete: it is written beside its place and renamed. The arrays are Orbax's.
"""

import contextlib
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from conversion.atomic import new_folder
from jaxlora.errors import raise_all
from jaxlora.select import expand, is_stacked

NAME = re.compile(r"checkpoint-(\d+)")
ARRAYS, RECORD = "trainer_arrays", "trainer_state.json"


def save(
    output_dir: pathlib.Path,
    step: int,
    trainable: Mapping[str, Any],
    opt_state: Any,
    record: Mapping[str, Any],
    *,
    extra: Callable[[pathlib.Path], None] | None = None,
    keep: int | None = None,
) -> pathlib.Path:
    """Writes ``output_dir/checkpoint-<step>`` and then drops all but the newest ``keep``.

    ``record`` is JSON (data position, configuration, log); ``extra(folder)`` adds files, such as the adapter in PEFT's format.
    """
    target = output_dir / f"checkpoint-{step}"
    output_dir.mkdir(parents=True, exist_ok=True)
    arrays = named_leaves({"trainable": trainable, "opt_state": opt_state})
    with new_folder(target, overwrite=True) as folder:
        with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
            checkpointer.save((folder / ARRAYS).absolute(), jax.device_get(arrays))
            checkpointer.wait_until_finished()
        (folder / RECORD).write_text(json.dumps({**record, "global_step": step}, indent=1))
        if extra is not None:
            extra(folder)
    if keep is not None:
        for old in find_all(output_dir)[:-keep]:
            shutil.rmtree(old)
    return target


def find_all(output_dir: pathlib.Path) -> list[pathlib.Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [
        (int(m[1]), path) for path in output_dir.glob("checkpoint-*") if (m := NAME.fullmatch(path.name)) and (path / RECORD).is_file()
    ]
    return [path for _, path in sorted(found)]


def sweep(output_dir: pathlib.Path) -> None:
    """Removes what saves that were killed half-way left; no other run may be writing there."""
    for path in output_dir.glob("checkpoint-*.tmp-*"):
        shutil.rmtree(path)


def read_record(folder: pathlib.Path) -> dict[str, Any]:
    """The JSON record of a checkpoint.

    Raises:
      ValueError: the folder is no checkpoint of ours.
    """
    path = folder / RECORD
    if not path.is_file():
        raise ValueError(f"{folder} has no {RECORD}: it is no checkpoint to resume from")
    return json.loads(path.read_text())


def restore(folder: pathlib.Path, trainable: Mapping[str, Any], opt_state: Any) -> tuple[dict[str, Any], Any]:
    """Reads (trainable, opt_state) back, into the structure of the given ones: layers may be grouped into other runs than when saved.

    Raises:
      ValueError: another model, adapter or optimizer: lists what is missing, too many, or of another shape.
    """
    with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
        stored = checkpointer.restore((folder / ARRAYS).absolute())
    layers = {path: (name, i) for name in stored for i, path in enumerate(expand(name))}
    wanted = named_leaves({"trainable": trainable, "opt_state": opt_state})
    needed = {path for name in wanted for path in expand(name)}
    faults = [f"{path}: only in the checkpoint" for path in layers if path not in needed]
    faults += [f"{path}: not in the checkpoint" for path in needed if path not in layers]
    raise_all(f"{folder} was written by another run", sorted(faults))

    def layer(path: str) -> np.ndarray:
        name, i = layers[path]
        return np.asarray(stored[name][i] if is_stacked(name) else stored[name])

    leaves = {
        name: stored[name] if name in stored else np.stack([layer(path) for path in expand(name)]) if is_stacked(name) else layer(name)
        for name in wanted
    }
    faults = [f"{n}: shape {np.shape(leaves[n])}, expected {np.shape(w)}" for n, w in wanted.items() if np.shape(leaves[n]) != np.shape(w)]
    raise_all(f"{folder} holds other shapes", faults)
    arrays = [jax.device_put(np.asarray(leaf)) for leaf in leaves.values()]
    tree = jax.tree.unflatten(jax.tree.structure({"trainable": trainable, "opt_state": opt_state}), arrays)
    return tree["trainable"], tree["opt_state"]


def named_leaves(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by dotted path, in the tree's own order; optax's named tuples give their field names."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
