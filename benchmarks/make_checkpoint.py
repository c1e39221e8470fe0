"""Writes a bf16 checkpoint with a real model's geometry and random weights: ``python make_checkpoint.py NAME FOLDER``."""

import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxlora.recipes.random_model import tensor_shapes

SHARD_BYTES = 5e9
GEOMETRIES = {
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
    },
    "qwen2-vl-7b": {
        "model_type": "qwen2_vl", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": False,
        "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "vision_config": {
            "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "in_chans": 3,
        },
    },
}  # fmt: skip


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
