"""The Qwen-VL models' references, and batches and forward passes of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlora.adapt import LoRAConfig, attach, fill_adapters, partition
from jaxlora.data.batches import make_batch
from jaxlora.data.ladder import Shape
from jaxlora.models import registry
from jaxlora.models.spec import Batch
from jaxlora.nn.decoder import Execution
from jaxlora.nn.stack import flatten, flatten_leaves, linear_paths, nest
from tests.jaxlora import reference

FAMILY = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# 45 tokens, 200 patches and 7 frames are used.
TOKENS, PATCHES, USED, FRAMES = 48, 208, 200, 8
INPUTS = "input_ids attention_mask pixel_values image_grid_thw pixel_values_videos video_grid_thw second_per_grid_ts".split()


@functools.cache
def values_of(model_type):
    """What batches need, with the rule of the weights for videos."""
    spec = registry.get(model_type)
    return spec.values(spec.tiny)


def hf5(model_type):
    """The same with transformers' rule."""
    values = values_of(model_type)
    return dataclasses.replace(values, vision=dataclasses.replace(values.vision, mrope_advance="hf5"))


expected = functools.cache(reference.expected)


def inputs_of(model_type):
    return {name: expected(model_type)[name] for name in INPUTS if name in expected(model_type)}


def kept(model_type):
    """Where the inputs have tokens, [b, s]."""
    return expected(model_type)["attention_mask"].astype(bool)


def at_tokens(model_type, array):
    """The values at tokens."""
    mask = kept(model_type)
    return np.asarray(array)[:, : mask.shape[1]][mask]


def micro(model_type, inputs=None, values=None, tokens=TOKENS, patches=PATCHES, rows=4, shards=1, frame=None) -> Batch:
    """One micro-batch on the device: the reference's inputs unless others are given."""
    inputs, values = inputs or inputs_of(model_type), values or hf5(model_type)
    batch = make_batch([inputs], values, Shape(tokens, patches, frame), rows=rows, images=FRAMES, shards=shards)
    return jax.tree.map(lambda a: jnp.asarray(a[0]), batch)


def loaded(model_type, dtype=jnp.float32):
    """A model that a test may change."""
    return reference.fresh(model_type, dtype=jnp.dtype(dtype).name).model


def logits_of(model, batch, execution=Execution()):  # noqa: B008
    return model.head().logits(model(batch, execution)[0])


def features_of(model, batch):
    """The merged features, in the order of the batch's patches."""
    return model.model.visual(batch, Execution(), batch.patches.dtype)[0]


@functools.cache
def shared_model(model_type):
    """A model that no test changes."""
    return loaded(model_type)


@functools.cache
def runner(model_type):
    """(batch, tree or the loaded one) -> logits, compiled once a shape."""
    graphdef, state = nnx.split(shared_model(model_type))
    compiled = jax.jit(lambda tree, batch: logits_of(nnx.merge(graphdef, tree), batch))
    return lambda batch, tree=None: np.asarray(compiled(nnx.to_pure_dict(state) if tree is None else tree, batch))


def adapted(model_type, select, dropout=0.0, full=False):
    """A model with random A and B, split for a step."""
    model = loaded(model_type)
    attach(model, select(linear_paths(model)), LoRAConfig(r=4, lora_dropout=dropout))
    random = np.random.default_rng(0)
    shapes = {path: leaf.shape for path, leaf in flatten(nnx.to_pure_dict(nnx.state(model))).items() if "lora" in path}
    fill_adapters(model, lambda path, leaf: random.normal(0, 0.2, shapes[f"{path}.{leaf}"]))
    return partition(model, full=full)


def square_loss(graphdef, frozen, batch, execution=Execution()):  # noqa: B008
    """The mean square of the logits as a function of the trainable tree."""

    def loss(trainable):
        whole = nest({**flatten_leaves(trainable), **flatten_leaves(frozen)})
        return jnp.mean(jnp.square(logits_of(nnx.merge(graphdef, whole), batch, execution)))

    return loss
