"""Arguments that do not fit together: all that is wrong is said at once. Of the checks themselves, since tests also run annotations."""

import jax.numpy as jnp
import pytest

from pallas_kernels.adapted_gated import front as adapted_gated
from pallas_kernels.gated_gradients import front as gated_gradients

WIDE, NARROW, COLUMNS = jnp.ones((4, 8)), jnp.ones((4, 2)), jnp.ones((8, 2))


def test_every_fault_of_scaled_products_is_told_at_once():
    faults = r"two products.*scales \[4\] in float32.*us \[4, R\] and bs \[8, R\].*a \[R, 8\].*one dtype.*silu, gelu, gelu_tanh, got 'relu'"
    scales, a = (jnp.ones(4), jnp.ones(3)), NARROW.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match=faults):
        adapted_gated._check((WIDE, WIDE[None]), scales, (NARROW, NARROW), (COLUMNS, COLUMNS.T), a, "relu")


def test_products_of_three_axes_are_told_their_shapes():
    with pytest.raises(ValueError, match=r"expected two products \[N, F\], got \(1, 4, 8\), \(1, 4, 8\)"):
        adapted_gated._check((WIDE[None], WIDE[None]), (jnp.ones(1),) * 2, (NARROW[:1],) * 2, (COLUMNS,) * 2, COLUMNS.T, "silu")


def test_scales_of_other_rows_are_refused():
    with pytest.raises(ValueError, match=r"expected scales \[4\] in float32, got \(3,\) float32"):
        gated_gradients._check(WIDE, WIDE, WIDE, (NARROW,) * 3, COLUMNS.T, jnp.ones(3), "silu")
