"""Token cross entropy of one micro-batch."""

import jax.numpy as jnp

from jaxlora.data.batches import Batch
from jaxlora.models.spec import CausalModel
from jaxlora.nn.decoder import Execution
from jaxlora.typing import Array, Float, Int
from pallas_kernels.linear_cross_entropy import linear_cross_entropy

IGNORED = -100


def label_count(labels: Int[Array, "..."]) -> Int[Array, ""]:
    """How many labels are trained."""
    return jnp.sum(labels != IGNORED)


def loss_sum(model: CausalModel, batch: Batch, execution: Execution, *, head_grad: bool) -> Float[Array, ""]:
    """Sum over labelled positions of -log p(label); the caller divides by the count of the whole optimizer step.

    Labels are already shifted. ``head_grad`` says whether the head's weight is trained (its gradient costs a product a chunk).
    """
    hidden, _ = model(batch, execution)
    head = model.head()
    lora = None if head.lora is None else (head.lora.a, head.lora.b, head.lora.scale)
    rows = hidden.reshape(-1, hidden.shape[-1])
    labels = batch.labels.reshape(-1)
    weight, chunk = head.weight.dequantise(), execution.loss_chunk
    return linear_cross_entropy(rows, weight, labels, lora=lora, softcap=head.softcap, weight_grad=head_grad, chunk=chunk)
