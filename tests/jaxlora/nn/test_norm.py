"""The norm's own backward against autodiff of its formula."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlora.nn.norm import LayerNorm, RMSNorm
from tests.tolerances import REORDERED_FP32


def formula(x, w, eps):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * w.reshape(1, 1, -1)


def test_both_gradients_are_autodiffs():
    x, w, dy = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 5, 24), (24,), (2, 5, 24)]))
    graphdef, _ = nnx.split(RMSNorm(24, eps=0.3, dtype=jnp.float32))

    def ours(x, w):
        return jnp.vdot(nnx.merge(graphdef, {"weight": w})(x), dy)

    found = jax.grad(ours, argnums=(0, 1))(x, w)
    expected = jax.grad(lambda x, w: jnp.vdot(formula(x, w, 0.3), dy), argnums=(0, 1))(x, w)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=10 * REORDERED_FP32)


def layer_formula(x, w, b, eps):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + eps) * w.reshape(1, 1, -1) + b.reshape(1, 1, -1)


def test_all_gradients_of_a_layer_norm_are_autodiffs():
    shapes = [(2, 5, 24), (24,), (24,), (2, 5, 24)]
    x, w, b, dy = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    graphdef, _ = nnx.split(LayerNorm(24, eps=0.3, dtype=jnp.float32))

    def ours(x, w, b):
        return jnp.vdot(nnx.merge(graphdef, {"weight": w, "bias": b})(x), dy)

    found = jax.grad(ours, argnums=(0, 1, 2))(x, w, b)
    expected = jax.grad(lambda x, w, b: jnp.vdot(layer_formula(x, w, b, 0.3), dy), argnums=(0, 1, 2))(x, w, b)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=10 * REORDERED_FP32)
