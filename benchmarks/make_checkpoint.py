"""Writes a bf16 checkpoint with a real model's geometry and random weights: ``python make_checkpoint.py NAME FOLDER``."""

import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from benchmarks.geometries import GEOMETRIES
from jaxlora.recipes.random_model import tensor_shapes

SHARD_BYTES = 5e9


def main(name: str, folder: str) -> None:
    started = time.perf_counter()
    target = pathlib.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    config = GEOMETRIES[name]
    draw = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16) * 0.02, static_argnums=1)
    shard, weight_map, files, size = {}, {}, 0, 0
    for i, (disk, shape) in enumerate(tensor_shapes(config).items()):
        shard[disk] = np.asarray(draw(jax.random.key(i), shape)) if len(shape) > 1 else np.ones(shape, jnp.bfloat16)
        size += shard[disk].nbytes
        weight_map[disk] = _file(files)
        if size > SHARD_BYTES:
            save_file(shard, target / _file(files), metadata={"format": "pt"})
            shard, files, size = {}, files + 1, 0
    save_file(shard, target / _file(files), metadata={"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (target / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}, indent=1))
    total = sum(f.stat().st_size for f in target.glob("*.safetensors"))
    print(f"wrote {name}: {total / 1e9:.1f} GB in {files + 1} shards, {time.perf_counter() - started:.0f} s", flush=True)


def _file(k: int) -> str:
    return f"model-{k:05d}.safetensors"


if __name__ == "__main__":
    main(*sys.argv[1:3])
