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
from jaxlora.select import expand, is_stacked
from jaxlora.weights.base import AbstractWeight


def write_random_checkpoint(
    folder: str | pathlib.Path, config: Mapping[str, Any], *, seed: int = 0, dtype: str = "float32"
) -> pathlib.Path:
    """Writes config.json and model.safetensors: matrices N(0, 0.02²) as most models are initialised, norms 1, biases 0.

    >>> # write_random_checkpoint("tiny", registry.get("llama").tiny)
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    stored = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    tensors = {name: _draw(rng, name, shape).astype(stored) for name, shape in tensor_shapes(config).items()}
    write_safetensors(folder / "model.safetensors", tensors)
    architecture = registry.get(config["model_type"]).architecture
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture], "dtype": dtype}, indent=2))
    return folder


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint of this config.json holds: {name on disk: shape}."""
    spec = registry.get(config["model_type"])
    leaves = flatten_leaves(nnx.to_pure_dict(nnx.state(spec.build(spec.read(config), dtype="float32"))))
    shapes = {}
    for stacked, leaf in leaves.items():
        one_layer = leaf.shape if isinstance(leaf, AbstractWeight) else leaf.shape[1 if is_stacked(stacked) else 0 :]
        shapes.update({spec.rules.spellings[0].to_disk(path): tuple(one_layer) for path in expand(stacked)})
    return shapes


def _draw(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    if path.endswith("bias"):
        return np.zeros(shape)
    return rng.normal(0, 0.02, shape) if len(shape) > 1 else np.ones(shape)
