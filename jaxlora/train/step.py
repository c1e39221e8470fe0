"""One optimizer step, compiled once a shape: accumulation, one normaliser, clipping, update, finite check."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxlora.data.batches import Batch
from jaxlora.nn.decoder import Execution
from jaxlora.nn.stack import flatten_leaves
from jaxlora.select import is_stacked
from jaxlora.train.loss import label_count, loss_sum
from jaxlora.typing import Array, Float, PRNGKeyArray

type Tree = Mapping[Any, Any]
type Metrics = dict[str, Any]
type Step = Callable[[Tree, Any, Tree, Batch, Any], tuple[Tree, Any, Metrics]]


def merge_trees(a: Tree, b: Tree) -> dict[str, Any]:
    """Two nested dicts with disjoint leaves as one."""
    return {k: merge_trees(a[k], b[k]) if k in a and k in b else a.get(k, b.get(k)) for k in {**a, **b}}


def value_and_grad(graphdef: Any, trainable: Tree, frozen: Tree, batch: Batch, execution: Execution) -> tuple[Float[Array, ""], Tree]:
    """Mean token loss of a whole optimizer step and its gradient, over the batch's leading accumulation axis.

    Loss = Σ token losses / Σ labelled tokens, both over all micro-batches, so that the split into micro-batches changes nothing.
    Gradients are accumulated in fp32 and returned in the parameters' dtypes. No labelled token: 0 and zero gradients.
    """
    count = jnp.maximum(label_count(batch.labels), 1).astype(jnp.float32)
    head_grad = any(path.endswith(("lm_head.weight", "embed_tokens.weight")) for path in flatten_leaves(trainable))

    def micro_loss(trainable: Tree, micro: Batch, index: Array) -> Float[Array, ""]:
        model = nnx.merge(graphdef, merge_trees(trainable, frozen))
        key = execution.dropout_key
        run = execution if key is None else Execution(**{**vars(execution), "dropout_key": jax.random.fold_in(key, index)})
        return loss_sum(model, micro, run, head_grad=head_grad) / count

    grad = jax.value_and_grad(micro_loss)
    accumulation = batch.labels.shape[0]
    if accumulation == 1:
        return grad(trainable, jax.tree.map(lambda a: a[0], batch), jnp.int32(0))

    def add(carry: Any, xs: Any) -> tuple[Any, None]:
        loss, sums = carry
        micro, gradient = grad(trainable, *xs)
        return (loss + micro, jax.tree.map(lambda s, g: s + g.astype(jnp.float32), sums, gradient)), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trainable)
    (loss, sums), _ = jax.lax.scan(add, (jnp.float32(0), zeros), (batch, jnp.arange(accumulation)))
    return loss, jax.tree.map(lambda s, p: s.astype(p.dtype), sums, trainable)


def make_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    execution: Execution,
    *,
    dropout_key: PRNGKeyArray | None = None,
    deterministic: bool = False,
    alike: bool = False,
) -> jax.stages.Wrapped:
    """Returns ``step(trainable, opt_state, frozen, batch, index) -> (trainable, opt_state, metrics)``, jitted; the first two are donated.

    ``index`` is the optimizer step (dropout follows it). Metrics: ``loss``, ``grad_norm`` (before clipping), ``tokens`` (labelled),
    ``finite``, and ``norms``, the gradient's norm of every leaf [layers of the leaf] by stacked path. A step whose loss or gradient is not
    finite changes nothing. ``deterministic`` asks XLA for the same bits in every run. ``alike`` is what
    `jaxlora.nn.stack.layers_alike` says of the model: where XLA then compiles each layer by itself, products read 16-bit weights in place.
    """
    in_place = alike and execution.scan.unroll is None
    scan = dataclasses.replace(execution.scan, in_place=in_place)

    def step(trainable: Tree, opt_state: Any, frozen: Tree, batch: Batch, index: Array) -> tuple[Tree, Any, Metrics]:
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        run = Execution(**{**vars(execution), "scan": scan, "dropout_key": key})
        loss, gradient = value_and_grad(graphdef, trainable, frozen, batch, run)
        norms = {path: _norms(path, leaf) for path, leaf in flatten_leaves(gradient).items()}
        grad_norm = jnp.sqrt(sum(jnp.sum(jnp.square(n)) for n in norms.values()))
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, new_state = optimizer.update(gradient, opt_state, trainable)
        updated = optax.apply_updates(trainable, updates)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        metrics = {"loss": loss, "grad_norm": grad_norm, "tokens": label_count(batch.labels), "finite": finite, "norms": norms}
        return keep(updated, trainable), keep(new_state, opt_state), metrics

    return jax.jit(step, donate_argnums=(0, 1), compiler_options=_compiler_options(deterministic=deterministic, in_place=in_place))


def _compiler_options(*, deterministic: bool, in_place: bool) -> dict[str, bool | str] | None:
    """XLA's flags, given to this program alone so that nothing global changes; measured at 8B, 4 x 2048, on an H200."""
    if jax.default_backend() != "gpu":
        return None
    return {
        "xla_gpu_deterministic_ops": deterministic,
        # What a scan saves for the backward is otherwise filled with zeros before it is written: 25 GB a step with "dots".
        "xla_gpu_enable_dus_accumulator_zero_init_elimination": True,
        # cuBLAS alone is as fast here, adds the adapter's product in place, and compiles in 8 s instead of 24.
        "xla_gpu_enable_triton_gemm": False,
        # A product then takes a layer's weight where it is, not a copy. In a loop it would run a product whose result is used and saved
        # twice, once for each: 15 % of a step with "dots".
        "xla_gpu_enable_dynamic_slice_fusion": in_place,
        # By data dependence alone: copies to and from host memory run beside products (7 % of a step with "unsloth"), small kernels too.
        "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
        # Orders what reads a block's input before what overwrites it, where XLA would copy the input.
        "xla_gpu_copy_insertion_use_region_analysis": True,
    }


def _norms(path: str, leaf: Any) -> Float[Array, "*layers"]:
    """The norm of each layer of a leaf; of the whole leaf where it is not stacked."""
    (array,) = jax.tree.leaves(leaf)
    axes = tuple(range(1 if is_stacked(path) else 0, array.ndim))
    return jnp.sqrt(jnp.sum(jnp.square(array.astype(jnp.float32)), axis=axes))
