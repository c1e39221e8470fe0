"""The tower's q, k and v against slices of their product."""

import jax
import jax.numpy as jnp
import pytest

from jaxlora.nn.vision import thirds


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_thirds_and_their_gradient_are_those_of_slices(dtype):
    x, *weights = (jax.random.normal(jax.random.key(i), (2, 5, n), dtype) for i, n in enumerate((36, 12, 12, 12)))

    def loss(split, x):
        return sum(jnp.vdot(part * part, weight) for part, weight in zip(split(x), weights, strict=True)).astype(jnp.float32)

    def slices(x):
        return x[..., :12], x[..., 12:24], x[..., 24:]

    assert all(jnp.array_equal(a, b) for a, b in zip(thirds(x), slices(x), strict=True))
    assert jnp.array_equal(jax.grad(loss, argnums=1)(thirds, x), jax.grad(loss, argnums=1)(slices, x))
