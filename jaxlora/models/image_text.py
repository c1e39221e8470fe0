"""What models with a vision tower share: the output head over two towers, and the names of the LLaVA lineage on disk."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from conversion.rules import Rename, Spelling, same
from jaxlora.data.batches import Batch
from jaxlora.models import text
from jaxlora.nn.decoder import Execution, Head, head_of
from jaxlora.nn.linear import Linear
from jaxlora.typing import Array, Float, Int
from jaxlora.weights.dense import Dense


class ImageTextLM(nnx.Module):
    """A model of two towers and its output head, under the paths ``model`` and ``lm_head``.

    ``config`` has the decoder's sizes in ``text`` and the whole model's tie flag; ``model`` has the decoder as ``language_model``.
    """

    def __init__(self, config: Any, model: nnx.Module, *, dtype: Any = jnp.bfloat16):
        self.config = config
        self.model: Any = model
        self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size, dtype=dtype, tied=config.tie_word_embeddings)

    def __call__(
        self, batch: Batch, execution: Execution, *, caches: Any = None, column: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B S D"], Any]:
        """Final hidden states of one micro-batch. In generation, only the prompt's batch has patches."""
        return self.model(batch, execution, caches=caches, column=column)

    def head(self) -> Head:
        """The output head: its own weight, or the embedding's table."""
        return head_of(self.lm_head, self.model.language_model.embed_tokens)

    def embed_table(self) -> Dense:
        """The embedding's table."""
        return self.model.language_model.embed_tokens.table

    def init_caches(self, batch: int, length: int, dtype: Any) -> tuple[Array, Array]:
        """Empty (k, v) caches [L, B, T, K, C]."""
        return text.init_caches(self.config.text, batch, length, dtype)


def lengthen(config: Any, max_seq_length: int) -> Any:
    """The config for sequences of that length."""
    return dataclasses.replace(config, text=text.lengthen(config.text, max_seq_length))


_OLD_TEXT = (
    Rename("multi_modal_projector", "model.multi_modal_projector"),
    Rename("language_model.model", "model.language_model"),
    Rename("language_model.lm_head", "lm_head"),
)
_NEW_TEXT = same("model.multi_modal_projector", "model.language_model", "lm_head")
SPELLINGS = (
    # CLIP and SigLIP have a level of their own.
    Spelling("hub", (Rename("vision_tower.vision_model", "model.vision_tower"), *_OLD_TEXT)),
    Spelling("v5", (*same("model.vision_tower"), *_NEW_TEXT)),
    # Pixtral on the hub, what transformers 5 writes of a model that it did not load, and the module tree of transformers 4.52 to 4.57.
    Spelling("hub of v5", (Rename("vision_tower", "model.vision_tower"), *_OLD_TEXT)),
    Spelling("v4", (Rename("model.vision_tower.vision_model", "model.vision_tower"), *_NEW_TEXT)),
)
TIES = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
