"""Small checkpoints of every kind of tensor."""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from conversion.safetensors_io import INDEX_NAME

PT = {"format": "pt"}


def draw(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a.weight": rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
        "b.weight": rng.normal(size=(4,)).astype(np.float32),
        "c.weight": rng.integers(0, 255, (7,)).astype(np.uint8),
        "scalar": np.array(2.5, np.float16),
        "empty": np.zeros((0, 3), np.float32),
    }


def sharded(folder, layout, weight_map=None):
    for file, tensors in layout.items():
        save_file(tensors, folder / file, PT)
    mapped = weight_map if weight_map is not None else {n: file for file, tensors in layout.items() for n in tensors}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": mapped}))
