"""Arguments that do not fit together: all that is wrong is said at once. Of the checks themselves, since tests also run annotations."""

import jax.numpy as jnp
import pytest

from pallas_kernels.adapted_activation import front as adapted_activation
from pallas_kernels.adapted_sum import front as adapted_sum
from pallas_kernels.functions import Function
from pallas_kernels.gated_gradients import front as gated_gradients
from pallas_kernels.logsumexp import logsumexp
from pallas_kernels.plain_gradients import front as plain_gradients

WIDE, NARROW, COLUMNS, ROW = jnp.ones((4, 8)), jnp.ones((4, 2)), jnp.ones((8, 2)), jnp.ones((1, 8))
GATED, SHORT = Function("gated", "silu"), jnp.ones(3)


def test_every_fault_of_scaled_products_is_told_at_once():
    faults = (
        r"activation of gated must be one of silu, gelu, gelu_tanh, got 'relu'.*products \[N, F\], 2 for gated, got \(4, 8\), \(1, 4, 8\)"
        r".*scales \[4\] in float32.*updates \(\[4, R\], \[8, R\]\), got \(\(4, 2\), \(8, 2\)\), \(\(4, 2\), \(2, 8\)\)"
        r".*none for gated, got \(1, 8\).*a \[R, 8\].*one dtype"
    )
    scales, a = (jnp.ones(4), SHORT), NARROW.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match=faults):
        updates = ((NARROW, COLUMNS), (NARROW, COLUMNS.T))
        adapted_activation._check((WIDE, WIDE[None]), scales, updates, a, Function("gated", "relu"), ROW)


def test_products_of_three_axes_are_told_their_shapes():
    with pytest.raises(ValueError, match=r"expected products \[N, F\], 2 for gated, got \(1, 4, 8\), \(1, 4, 8\)"):
        adapted_activation._check((WIDE[None], WIDE[None]), (jnp.ones(1),) * 2, ((NARROW[:1], COLUMNS),) * 2, COLUMNS.T, GATED, None)


def test_an_activation_is_told_how_many_products_it_takes():
    faults = r"1 for plain, got \(4, 8\), \(4, 8\).*scales and updates of 2 products, got 1 and 1.*a bias \[1, 8\] for plain"
    with pytest.raises(ValueError, match=faults):
        plain = Function("plain", "gelu")
        adapted_activation._check((WIDE, WIDE), (jnp.ones(4),), ((NARROW, COLUMNS),), COLUMNS.T, plain, None)
    with pytest.raises(ValueError, match=r'function must be "gated" or "plain", got \'rms_norm\''):
        adapted_activation._check((WIDE,), (jnp.ones(4),), ((NARROW, COLUMNS),), COLUMNS.T, Function("rms_norm"), ROW)


def test_scales_of_other_rows_are_refused():
    with pytest.raises(ValueError, match=r"expected scales \[4\] in float32, got \(3,\) float32"):
        gated_gradients._check(WIDE, WIDE, WIDE, (NARROW,) * 3, COLUMNS.T, SHORT, None, "silu")


def test_what_a_gradient_is_to_scale_and_add_is_checked_too():
    faults = r"scales \[4\] in float32, got \(3,\) float32.*bs \[8, R\] for each of 2 products, got \(8, 2\), \(2, 8\)"
    with pytest.raises(ValueError, match=faults):
        unscaled = ((SHORT, COLUMNS), (jnp.ones(4), COLUMNS.T))
        gated_gradients._check(WIDE, WIDE, WIDE, (NARROW,) * 3, COLUMNS.T, None, unscaled, "silu")
    faults = r"scales \[4\] in float32, got .*a \[2, 8\] with the scales of dh, got \(8, 2\).*b \[8, 2\] .*got \(2, 8\)"
    with pytest.raises(ValueError, match=faults):
        plain_gradients._check(WIDE, ROW, WIDE, (NARROW, NARROW), (SHORT, COLUMNS), (SHORT, COLUMNS.T), "gelu")


def test_scales_of_one_product_beside_another_without_any_are_refused():
    with pytest.raises(ValueError, match="expected scales of both e and g or of neither, got those of one"):
        gated_gradients._check(WIDE, WIDE, WIDE, (NARROW,) * 3, COLUMNS.T, None, ((None, COLUMNS), (jnp.ones(4), COLUMNS)), "silu")


@pytest.mark.parametrize("b", [COLUMNS.T, jnp.ones((9, 2))], ids=["turned", "more columns than the product"])
def test_every_fault_of_a_sum_is_told_at_once(b):
    faults = (
        r"z \[N, F or more\], u \[N, R\] and b \[F, R\], got \(4, 8\), \(4, 2\).*scales \(4,\) in float32, got \(3,\) float32.*one dtype"
    )
    with pytest.raises(ValueError, match=faults):
        adapted_sum._check(WIDE, SHORT, NARROW, b.astype(jnp.bfloat16))


def test_logits_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match=r"expected \[N, V\] in float32, got \(4, 8\) in bfloat16"):
        logsumexp(WIDE.astype(jnp.bfloat16))
