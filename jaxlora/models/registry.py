"""The architectures: one line each, imported when asked for."""

import importlib

from jaxlora.errors import nearest
from jaxlora.models.spec import ModelSpec

MODELS = {
    "llama": "jaxlora.models.llama",
    "mistral": "jaxlora.models.mistral",
    "qwen2": "jaxlora.models.qwen2",
    "qwen2_vl": "jaxlora.models.qwen2_vl",
    "qwen3": "jaxlora.models.qwen3",
}


def get(model_type: str) -> ModelSpec:
    """Returns the spec of a model_type.

    Raises:
      NotImplementedError: the architecture is not modelled; names the nearest one that is.
    """
    if model_type not in MODELS:
        raise NotImplementedError(
            f"model_type {model_type!r} is not modelled{nearest(model_type, MODELS)}; there are {', '.join(sorted(MODELS))}"
        )
    return importlib.import_module(MODELS[model_type]).SPEC
