"""Writes a bf16 checkpoint with a real model's geometry and random weights: ``python -m benchmarks.make_checkpoint NAME FOLDER``.

With a tokenizer of a few hundred entries, which the rivals' loaders insist on; the benchmarks' token ids never go through it.
"""

import json
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from benchmarks.geometries import GEOMETRIES
from jaxlora.models import registry
from jaxlora.recipes.random_model import tensor_shapes
from jaxlora.recipes.tiny_tokenizer import ROLES, SPECIAL_TOKENS, make_tokenizer

SHARD_BYTES = 5e9
TOKENIZERS = {"qwen2_5_vl": "qwen2_vl", "llava": "pixtral"}


def write_checkpoint(config: Mapping[str, Any], target: pathlib.Path) -> int:
    """Writes the folder; the number of its shards. Matrices N(0, 0.02²), vectors 1, biases 0."""
    target.mkdir(parents=True, exist_ok=True)
    draw = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16) * 0.02, static_argnums=1)
    shard, weight_map, files, size = {}, {}, 0, 0
    for i, (disk, shape) in enumerate(tensor_shapes(config).items()):
        vector = np.zeros(shape, jnp.bfloat16) if disk.endswith("bias") else np.ones(shape, jnp.bfloat16)
        shard[disk] = np.asarray(draw(jax.random.key(i), shape)) if len(shape) > 1 else vector
        size += shard[disk].nbytes
        weight_map[disk] = _file(files)
        if size > SHARD_BYTES:
            save_file(shard, target / _file(files), metadata={"format": "pt"})
            shard, files, size = {}, files + 1, 0
    save_file(shard, target / _file(files), metadata={"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    kind = config["model_type"]
    family = TOKENIZERS.get(kind, kind)
    special = {f"{role}_id": SPECIAL_TOKENS[family].index(token) for role, token in ROLES[family].items() if role != "unk_token"}
    whole = {"architectures": [registry.get(kind).architecture], **config, **special, "torch_dtype": "bfloat16"}
    (target / "config.json").write_text(json.dumps(whole, indent=1))
    make_tokenizer(target, family)
    return files + 1


def main(name: str, folder: str) -> None:
    started, target = time.perf_counter(), pathlib.Path(folder)
    shards = write_checkpoint(GEOMETRIES[name], target)
    total = sum(f.stat().st_size for f in target.glob("*.safetensors"))
    print(f"wrote {name}: {total / 1e9:.1f} GB in {shards} shards, {time.perf_counter() - started:.0f} s", flush=True)


def _file(k: int) -> str:
    return f"model-{k:05d}.safetensors"


if __name__ == "__main__":
    main(*sys.argv[1:3])
