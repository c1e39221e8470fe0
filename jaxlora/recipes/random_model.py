"""A Hugging Face folder with random weights: for the quickstart, benchmarks and tests, where nothing can be downloaded."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx

from conversion.safetensors_write import write_safetensors
from jaxlora.models import registry
from jaxlora.nn.stack import flatten_leaves
from jaxlora.select import expand
from jaxlora.weights.base import AbstractWeight


def write_random_checkpoint(
    folder: str | pathlib.Path, config: Mapping[str, Any], *, seed: int = 0, dtype: str = "float32"
) -> pathlib.Path:
    """Writes config.json and model.safetensors: matrices N(0, 0.02²) as most models are initialised, norms 1, biases 0.

    >>> # write_random_checkpoint("tiny", registry.get("llama").tiny)
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spec = registry.get(config["model_type"])
    model = spec.build(spec.read(config), dtype=dtype)
    rng = np.random.default_rng(seed)
    spelling = spec.rules.spellings[0]
    stored = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    tensors = {}
    for stacked, leaf in flatten_leaves(nnx.to_pure_dict(nnx.state(model))).items():
        paths = expand(stacked)
        shape = leaf.shape if isinstance(leaf, AbstractWeight) else leaf.shape[0 if paths == [stacked] else 1 :]
        for path in paths:
            tensors[spelling.to_disk(path)] = _draw(rng, path, shape).astype(stored)
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [spec.architecture], "dtype": dtype}, indent=2))
    return folder


def _draw(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    if path.endswith("bias"):
        return np.zeros(shape)
    return rng.normal(0, 0.02, shape) if len(shape) > 1 else np.ones(shape)
