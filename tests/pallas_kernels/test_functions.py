"""Sums over the rows of a norm, from its statistics, against the norm itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.functions import Function
from tests.tolerances import REORDERED_FP32


@pytest.mark.parametrize("form", ["rms_norm", "layer_norm"])
def test_a_sum_over_the_rows_of_a_norm_needs_no_norm(form):
    """Rows whose mean is ten times their spread."""
    function, draw = Function(form, eps=1e-3), np.random.default_rng(0)
    x, du = jnp.asarray(10 + draw.standard_normal((40, 24)), jnp.float32), jnp.asarray(draw.standard_normal((40, 3)), jnp.float32)
    rows = [jnp.asarray(draw.standard_normal((1, 24)), jnp.float32) for _ in range(function.inputs[1])]
    found = function.sum_over_rows(du, (x, *rows), function.statistics(x))
    expected = du.T @ function(x, *rows)
    assert jnp.linalg.norm(found - expected) <= 100 * REORDERED_FP32 * jnp.linalg.norm(expected)


def test_activations_have_no_statistics():
    assert Function("plain", "gelu").statistics(jnp.ones((2, 3))) is None


def test_statistics_are_those_of_each_row():
    x = jax.random.normal(jax.random.key(0), (5, 64)) + 3
    inverse, mean = Function("layer_norm").statistics(x).T
    np.testing.assert_allclose(inverse, 1 / jnp.std(x, axis=1), rtol=1e-5)
    np.testing.assert_allclose(mean, x.mean(1), rtol=1e-5)
