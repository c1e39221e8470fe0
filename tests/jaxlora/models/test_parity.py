"""Every text architecture against transformers: logits, sub-modules, bf16; and each parameter and trick shown to matter.

The references are golden folders (tests/oracle/make_golden.py writes them); with JAXLORA_ORACLE_PYTHON they are made live.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlora.data.batches import make_batch
from jaxlora.data.ladder import Shape
from jaxlora.models import registry
from jaxlora.nn import attention as attention_module
from jaxlora.nn.decoder import Execution, head_of
from jaxlora.nn.stack import Stack, flatten_leaves
from jaxlora.select import expand, layers_of
from jaxlora.train.loss import loss_sum
from tests.jaxlora import reference
from tests.tolerances import LOGITS_FP32, LOSS_FP32, SENSITIVITY

TEXT = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")


@functools.cache
def loaded(model_type, dtype="float32"):
    return reference.fresh(model_type, dtype=jnp.dtype(dtype).name)


def text_batch(model_type):
    arrays = reference.expected(model_type)
    values = loaded(model_type).spec.values(loaded(model_type).raw_config)
    batch = make_batch([{k: arrays[k] for k in ("input_ids", "attention_mask")}], values, Shape(32, 0), rows=2)
    return jax.tree.map(lambda a: jnp.asarray(a[0]), batch)


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, tree, batch):
    model = nnx.merge(graphdef, tree)
    hidden, _ = model(batch, Execution())
    return model.head().logits(hidden)


def logits(model, batch):
    return _forward(*nnx.split(model), batch)


def at_tokens(model_type, array):
    """The values at un-padded positions."""
    mask = reference.expected(model_type)["attention_mask"].astype(bool)
    return np.asarray(array)[:, : mask.shape[1]][mask]


@pytest.mark.parametrize("model_type", TEXT)
def test_logits_equal_transformers(model_type):
    ours = at_tokens(model_type, logits(loaded(model_type).model, text_batch(model_type)))
    theirs = at_tokens(model_type, reference.expected(model_type)["logits"])
    assert np.abs(ours - theirs).max() <= LOGITS_FP32


@pytest.mark.parametrize("model_type", TEXT)
def test_every_submodule_equals_transformers(model_type):
    model, batch, theirs = loaded(model_type).model, text_batch(model_type), reference.expected(model_type)
    ours = {}
    stack = model.model.layers

    def run(x, shared, layers):
        for i in range(stack.depth):
            block = nnx.merge(*_layer(stack, i))
            ours[f"model.layers.{i}.self_attn"] = block.self_attn(block.input_layernorm(x), shared, layers)[0]
            x, _ = block(x, shared, layers)
            ours[f"model.layers.{i}"] = x
        ours["model.norm"] = model.model.norm(x)

    embedded = model.model.embed_tokens(batch.input_ids)
    shared = model.model.shared(batch.position_ids, (batch.segment_starts, batch.segment_lengths), embedded.dtype)
    run(embedded, shared, attention_module.LayerInputs())
    for name, value in ours.items():
        difference = at_tokens(model_type, value) - at_tokens(model_type, theirs[f"module:{name}"])
        assert np.abs(difference).max() <= LOGITS_FP32, name


def _layer(stack: Stack, i: int):
    key = next(k for run in stack.runs for k in run.keys if i in layers_of(k))
    graphdef, state = nnx.split(getattr(stack, key))
    at = layers_of(key).index(i)
    return graphdef, jax.tree.map(lambda a: a[at], state)


@functools.partial(jax.jit, static_argnums=0)
def _with_cache(graphdef, tree, batch, caches, column):
    model = nnx.merge(graphdef, tree)
    hidden, caches = model(batch, Execution(), caches=caches, column=column)
    return model.head().logits(hidden), caches


@pytest.mark.parametrize("model_type", TEXT)
def test_decoding_with_a_cache_gives_transformers_logits(model_type):
    model, arrays = loaded(model_type).model, reference.expected(model_type)
    values, ids, known = loaded(model_type).spec.values(loaded(model_type).raw_config), arrays["input_ids"][:1], 20
    split = nnx.split(model)

    def micro(ids):
        batch = make_batch([{"input_ids": ids}], values, Shape(ids.shape[1]), rows=1)
        return jax.tree.map(lambda a: jnp.asarray(a[0]), batch)

    _, caches = _with_cache(*split, micro(ids[:, :known]), model.init_caches(1, ids.shape[1], jnp.float32), jnp.array([0]))
    for at in range(known, ids.shape[1]):
        step = dataclasses.replace(micro(ids[:, at : at + 1]), position_ids=jnp.array([[at]]))
        ours, caches = _with_cache(*split, step, caches, jnp.array([at]))
        assert np.abs(ours[0, 0] - arrays["logits"][0, at]).max() <= LOGITS_FP32, at


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "llama"])
def test_the_loss_is_that_of_transformers_logits_cap_included(model_type):
    model, batch = loaded(model_type).model, text_batch(model_type)
    logits = jax.nn.log_softmax(reference.expected(model_type)["logits"].astype(np.float64))
    labels = np.full(batch.labels.shape, -100, np.int32)
    labels[0, 3:20] = np.arange(17) * 13
    expected = -sum(float(logits[0, i, labels[0, i]]) for i in range(3, 20))
    ours = loss_sum(model, dataclasses.replace(batch, labels=jnp.asarray(labels)), Execution(), head_grad=False)
    assert abs(float(ours) - expected) / 17 <= LOSS_FP32


@pytest.mark.parametrize("model_type", TEXT)
def test_bf16_error_is_no_worse_than_transformers_own(model_type):
    arrays = reference.expected(model_type)
    ours = at_tokens(model_type, logits(loaded(model_type, "bfloat16").model, text_batch(model_type)))
    exact, theirs = at_tokens(model_type, arrays["logits"]), at_tokens(model_type, arrays["logits_bf16"])
    assert np.linalg.norm(ours - exact) <= 1.2 * np.linalg.norm(theirs - exact)


@pytest.mark.parametrize("model_type", TEXT)
def test_every_parameter_moves_the_logits(model_type):
    model, batch = loaded(model_type).model, text_batch(model_type)
    graphdef, state = nnx.split(model)
    leaves = flatten_leaves(nnx.to_pure_dict(state))
    base = at_tokens(model_type, _forward(graphdef, state, batch))
    dead = []
    for stacked, leaf in leaves.items():
        for i, path in enumerate(expand(stacked)):
            layer = ... if expand(stacked) == [stacked] else i
            changed = jax.tree.map(
                lambda a, layer=layer, i=i: a.at[layer].add(jax.random.normal(jax.random.key(i), a[layer].shape) * a[layer].std()), leaf
            )
            tree = nnx.to_pure_dict(state)
            node = tree
            *parents, last = stacked.split(".")
            for parent in parents:
                node = node[parent]
            node[last] = changed
            moved = np.abs(at_tokens(model_type, _forward(graphdef, _state_like(state, tree), batch)) - base).max()
            if moved <= SENSITIVITY:
                dead.append((path, moved))
    assert not dead


def _state_like(state, tree):
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(tree))


def _without_rope(model, batch, monkeypatch):
    return model, dataclasses.replace(batch, position_ids=jnp.zeros_like(batch.position_ids))


def _without_causal_mask(model, batch, monkeypatch):
    real = attention_module.attention
    monkeypatch.setattr(attention_module, "attention", lambda *a, **k: real(*a, **{**k, "causal": False}))
    return model, batch


def _without_segments(model, batch, monkeypatch):
    halves = jnp.array([[0, 10], [0, 10]]), jnp.array([[10, 19], [10, 13]])
    return model, dataclasses.replace(batch, segment_starts=halves[0], segment_lengths=halves[1])


def _without_scale(model, batch, monkeypatch):
    real = attention_module.attention
    monkeypatch.setattr(attention_module, "attention", lambda *a, **k: real(*a, **{**k, "scale": 1.0}))
    return model, batch


def _without_softcap(model, batch, monkeypatch):
    real = attention_module.attention
    monkeypatch.setattr(attention_module, "attention", lambda *a, **k: real(*a, **{**k, "softcap": None}))
    return model, batch


def _without_final_softcap(model, batch, monkeypatch):
    monkeypatch.setattr(type(model), "head", lambda self: head_of(self.lm_head, self.model.embed_tokens))
    return model, batch


def _without_embedding_scale(model, batch, monkeypatch):
    monkeypatch.setattr(model.model.embed_tokens, "scale", None)
    return model, batch


def _without_local_rope(model, batch, monkeypatch):
    monkeypatch.setattr(model.model, "config", dataclasses.replace(model.model.config, local_rope=None))
    return model, batch


def _without_window(model, batch, monkeypatch):
    real = attention_module.attention
    monkeypatch.setattr(attention_module, "attention", lambda *a, **k: real(*a, **{**k, "window": None}))
    return model, batch


TRICKS = {"rope": _without_rope, "mask": _without_causal_mask, "segments": _without_segments, "scale": _without_scale}
SOME = {
    "window": (_without_window, ("gemma2", "gemma3_text", "mistral", "qwen2")),
    "softcap": (_without_softcap, ("gemma2",)),
    "final_softcap": (_without_final_softcap, ("gemma2", "gemma3_text")),
    "embedding_scale": (_without_embedding_scale, ("gemma2", "gemma3_text")),
    "local_rope": (_without_local_rope, ("gemma3_text",)),
}
CASES = [(m, t) for m in TEXT for t in TRICKS] + [(m, t) for t, (_, models) in SOME.items() for m in models]


@pytest.mark.parametrize(("model_type", "trick"), CASES)
def test_dropping_what_attention_does_moves_the_logits(model_type, trick, monkeypatch):
    model, batch = loaded(model_type).model, text_batch(model_type)
    base = at_tokens(model_type, logits(model, batch))
    # The patched attention is another program with the same arguments.
    _forward.clear_cache()
    drop = TRICKS[trick] if trick in TRICKS else SOME[trick][0]
    changed = drop(model, batch, monkeypatch)
    assert np.abs(at_tokens(model_type, logits(*changed)) - base).max() > SENSITIVITY


@pytest.mark.parametrize("model_type", TEXT)
def test_config_refuses_a_key_that_nobody_models(model_type):
    spec = registry.get(model_type)
    with pytest.raises(ValueError, match="hidden_sise"):
        spec.read({**spec.tiny, "hidden_sise": 3})
