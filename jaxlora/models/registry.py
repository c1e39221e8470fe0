"""The architectures: one line each, imported when asked for."""

import importlib

from jaxlora.errors import nearest
from jaxlora.models.spec import ModelSpec

MODELS = {
    "gemma2": "jaxlora.models.gemma2",
    "gemma3": "jaxlora.models.gemma3",
    "gemma3_text": "jaxlora.models.gemma3_text",
    "llama": "jaxlora.models.llama",
    "llava": "jaxlora.models.llava",
    "mistral": "jaxlora.models.mistral",
    "mistral3": "jaxlora.models.mistral3",
    "mllama": "jaxlora.models.mllama",
    "qwen2": "jaxlora.models.qwen2",
    "qwen2_5_vl": "jaxlora.models.qwen2_5_vl",
    "qwen2_vl": "jaxlora.models.qwen2_vl",
    "qwen3": "jaxlora.models.qwen3",
    "qwen3_vl": "jaxlora.models.qwen3_vl",
}


def get(model_type: str) -> ModelSpec:
    """Returns the spec of a model_type.

    Raises:
      NotImplementedError: the architecture is not modelled; names the nearest one that is, and the page on how one is added.
    """
    if model_type not in MODELS:
        raise NotImplementedError(
            f"model_type {model_type!r} is not modelled{nearest(model_type, MODELS)}; there are {', '.join(sorted(MODELS))}. "
            "The page 'Add an architecture' (docs/add-an-architecture.md) says how to add one"
        )
    return importlib.import_module(MODELS[model_type]).SPEC
