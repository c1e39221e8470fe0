"""Training on the responses alone, in the rows of a trainer."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxlora.api.dataset import Source, TextSource
from jaxlora.api.trainer import SFTTrainer
from jaxlora.data.responses import make_markers, mask_to_responses


def train_on_responses_only(
    trainer: SFTTrainer,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    *,
    last_response_only: bool = False,
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,
) -> Any:
    """Masks everything but the responses, found by two marker strings, in the rows of a trainer for text; returns the trainer.

    With ``return_function`` it returns instead the function (rows of ids, their labels) → labels. Rows without a target are dropped.

    Raises:
      ValueError: one marker without the other; no row has a target (says which marker never matched).
    """
    tokenizer = tokenizer or getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    markers = make_markers(tokenizer, instruction_part, response_part, force_match=force_match)

    def mask(rows: Sequence[np.ndarray], labels: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        return mask_to_responses(rows, labels, markers, last_response_only=last_response_only)

    if return_function:
        return mask
    trainer.train_source = _masked(trainer.train_source, mask)
    if trainer.eval_source is not None:
        trainer.eval_source = _masked(trainer.eval_source, mask)
    return trainer


def _masked(source: Source, mask: Callable[..., list[np.ndarray]]) -> Source:
    if not isinstance(source, TextSource):
        raise NotImplementedError("rows with a collator are masked by the collator: pass train_on_responses_only=True to it")
    return source.relabelled(mask([row.input_ids for row in source.encoded], [row.labels for row in source.encoded]))
