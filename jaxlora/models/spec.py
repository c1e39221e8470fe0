"""What the rest of jaxlora knows of an architecture."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from conversion.rules import Rules
from jaxlora.data.batches import Batch
from jaxlora.data.inputs import ModelValues
from jaxlora.nn.decoder import Execution, Head
from jaxlora.typing import Array, Float, Int

jax.tree_util.register_dataclass(Batch, data_fields=[f.name for f in dataclasses.fields(Batch)], meta_fields=[])


@runtime_checkable
class CausalModel(Protocol):
    """What a model answers to. It is an nnx.Module whose paths are Hugging Face's."""

    config: Any

    def __call__(
        self, batch: Batch, execution: Execution, *, caches: Any = None, column: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B S D"], Any]:
        """Final hidden states of one micro-batch (a Batch without its first axis) and, in generation, the caches."""
        ...

    def head(self) -> Head:
        """The output head."""
        ...

    def init_caches(self, batch: int, length: int, dtype: Any) -> Any:
        """Empty (k, v) caches with a leading layer axis."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One architecture.

    ``read`` turns a config.json into the model's config and refuses what is not modelled; ``build`` makes the module with abstract
    leaves; ``rules`` are its names on disk; ``values`` is what batches need to know; ``tiny`` is a config.json with odd sizes, on which
    the parity tests run; ``architecture`` is the class in transformers. ``unused(config, path)`` says that nothing uses what a Linear
    computes (a tower's layers behind the one whose state is taken): an adapter there has no gradient.
    """

    model_type: str
    architecture: str
    read: Callable[[Mapping[str, Any]], Any]
    build: Callable[..., Any]
    rules: Rules
    values: Callable[[Any], ModelValues]
    lengthen: Callable[[Any, int], Any]
    tiny: Mapping[str, Any]
    unused: Callable[[Any, str], bool] = lambda config, path: False
