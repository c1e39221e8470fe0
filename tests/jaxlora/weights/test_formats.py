"""Error of each format on normal weights, against published or measured figures; invariants of every leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.weights import base
from jaxlora.weights.dense import Dense
from jaxlora.weights.int4 import Int4
from jaxlora.weights.nf4 import NF4
from tests.tolerances import ROUNDED_BF16

# Relative Frobenius error on normal weights in groups of 64; docs/numerics.md says where the figures come from.
RELATIVE_ERROR = {"int4": 0.0899, "nf4": 0.0920}
NF4_MEAN_ABSOLUTE_ERROR = 0.072798  # bitsandbytes' test_functional.py, block size 64


@pytest.fixture(scope="module")
def weights():
    return jax.random.normal(jax.random.key(0), (1024, 1024))


def relative_error(w, leaf):
    return float(jnp.linalg.norm(leaf.dequantise() - w) / jnp.linalg.norm(w))


def test_int4_error_on_normal_weights_is_the_searched_scales_error(weights):
    assert relative_error(weights, Int4.quantise(weights)) == pytest.approx(RELATIVE_ERROR["int4"], abs=2e-4)


def test_nf4_relative_error_is_bitsandbytes(weights):
    assert relative_error(weights, NF4.quantise(weights, double_quant=False)) == pytest.approx(RELATIVE_ERROR["nf4"], abs=2e-4)


def test_nf4_mean_absolute_error_is_the_published_one(weights):
    error = jnp.abs(NF4.quantise(weights, double_quant=False).dequantise() - weights).mean()
    assert float(error) == pytest.approx(NF4_MEAN_ABSOLUTE_ERROR, abs=3 * 7.4e-5)


def quantised(name, w):
    return {"int4": Int4.quantise, "nf4": NF4.quantise, "nf4 single": lambda w: NF4.quantise(w, double_quant=False)}[name](w)


@pytest.mark.parametrize("name", ["int4", "nf4", "nf4 single"])
@pytest.mark.parametrize("shape", [(24, 128), (20, 100), (5, 64)])
class TestEveryFormat:
    def test_matmul_is_the_product_with_the_dequantised_weight(self, name, shape):
        w = jax.random.normal(jax.random.key(1), shape) / shape[1] ** 0.5
        leaf, x = quantised(name, w), jax.random.normal(jax.random.key(2), (7, shape[1]))
        np.testing.assert_allclose(leaf.matmul(x), x @ leaf.dequantise().T, atol=1e-5)

    def test_matmul_t_is_its_transpose(self, name, shape):
        w = jax.random.normal(jax.random.key(1), shape) / shape[1] ** 0.5
        leaf, dy = quantised(name, w), jax.random.normal(jax.random.key(2), (7, shape[0]))
        np.testing.assert_allclose(leaf.matmul_t(dy), dy @ leaf.dequantise(), atol=1e-5)

    def test_the_shape_is_logical(self, name, shape):
        leaf = quantised(name, jax.random.normal(jax.random.key(1), shape))
        assert leaf.shape == shape == leaf.dequantise().shape

    def test_abstract_has_the_structure_of_a_real_leaf(self, name, shape):
        leaf = quantised(name, jax.random.normal(jax.random.key(1), shape))
        kind = {"nf4 single": lambda s, d: NF4.abstract(s, d, double_quant=False), "nf4": NF4.abstract, "int4": Int4.abstract}[name]
        want = kind(shape, jnp.float32)
        assert jax.tree.structure(want) == jax.tree.structure(leaf)
        assert [(a.shape, a.dtype) for a in jax.tree.leaves(want)] == [(a.shape, a.dtype) for a in jax.tree.leaves(leaf)]

    def test_an_all_zero_weight_stays_zero(self, name, shape):
        assert not np.any(quantised(name, jnp.zeros(shape)).dequantise())

    def test_a_stack_of_leaves_is_sliced_back_by_scan(self, name, shape):
        leaves = [quantised(name, jax.random.normal(jax.random.key(i), shape)) for i in range(3)]
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *leaves)
        _, decoded = jax.lax.scan(lambda c, leaf: (c, leaf.dequantise()), 0, stacked)
        for i, leaf in enumerate(leaves):
            np.testing.assert_array_equal(decoded[i], leaf.dequantise())


def test_int4_decodes_each_code_times_its_scale():
    codes = jnp.arange(-8, 8).repeat(8).reshape(2, 64)
    leaf = Int4.from_codes(codes, jnp.array([[0.5], [-2.0]]), dtype=jnp.float32)
    np.testing.assert_array_equal(leaf.dequantise(), np.asarray(codes) * np.array([[0.5], [-2.0]]))


def test_int4_stores_the_even_column_in_the_low_nibble():
    codes = jnp.zeros((1, 64), int).at[0, 0].set(3).at[0, 1].set(-1)
    assert int(Int4.from_codes(codes, jnp.ones((1, 1))).codes[0, 0]) == 3 | (15 << 4)


def test_int4_never_does_worse_than_rounding_to_absmax(weights):
    groups = weights.reshape(-1, 64)
    scale = (jnp.abs(groups).max(1, keepdims=True) / 7).astype(jnp.bfloat16).astype(jnp.float32)
    plain = jnp.clip(jnp.round(groups / scale), -8, 7) * scale
    searched = Int4.quantise(weights).dequantise().reshape(-1, 64)
    assert jnp.all(jnp.square(searched - groups).sum(1) <= jnp.square(plain - groups).sum(1) + 1e-6)


def test_int4_refuses_scales_that_do_not_fit():
    with pytest.raises(ValueError, match="groups of 64"):
        Int4.from_codes(jnp.zeros((2, 128), int), jnp.ones((2, 1)))


def test_nf4_takes_four_bits_and_a_bit_more(weights):
    assert NF4.quantise(weights).nbytes * 8 / weights.size == pytest.approx(4.127, abs=0.01)


def product(x, w):
    return np.asarray(x, np.float32) @ np.asarray(w, np.float32)


@pytest.mark.parametrize("form", [Dense, Int4.quantise, NF4.quantise], ids=["dense", "int4", "nf4"])
@pytest.mark.parametrize("width", [128, 100])
class TestOneProduct:
    """What GPUs run: the adapter's columns and rows are part of the decoded array."""

    @pytest.fixture(autouse=True)
    def on_a_gpu(self, monkeypatch):
        monkeypatch.setattr(base, "one_product", lambda width, columns: True)

    def draw(self, seed, *shape):
        return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)

    def close(self, found, expected):
        assert np.linalg.norm(np.asarray(found, np.float32) - expected) <= ROUNDED_BF16 * np.linalg.norm(expected)

    def test_the_output_with_an_update(self, form, width):
        w, x, u, b = form(self.draw(0, 256, width)), self.draw(1, 32, width), self.draw(2, 32, 16), self.draw(3, 256, 16)
        self.close(w.matmul(x, (u, b)), product(x, w.dequantise().T) + product(u, b.T))

    def test_the_input_gradient_with_an_update(self, form, width):
        w, dy, u, a = form(self.draw(0, 48, width)), self.draw(1, 32, 48), self.draw(2, 32, 16), self.draw(3, 16, width)
        self.close(w.matmul_t(dy, (u, a)), product(dy, w.dequantise()) + product(u, a))

    def test_the_input_gradient_of_a_group(self, form, width):
        ws = [form(self.draw(i, rows, width)) for i, rows in enumerate((48, 16, 16))]
        dys = [self.draw(10 + i, 32, w.shape[0]) for i, w in enumerate(ws)]
        u, a = self.draw(2, 32, 16), self.draw(3, 16, width)
        expected = sum(product(dy, w.dequantise()) for dy, w in zip(dys, ws, strict=True)) + product(u, a)
        self.close(base.input_gradient(ws, dys, (u, a)), expected)

    def test_the_input_gradient_of_a_group_with_its_columns(self, form, width):
        ws = [form(self.draw(i, rows, width)) for i, rows in enumerate((48, 16, 16))]
        dys = [self.draw(10 + i, 32, w.shape[0]) for i, w in enumerate(ws)]
        columns, a = [self.draw(20 + i, w.shape[0], 16) for i, w in enumerate(ws)], self.draw(3, 16, width)
        dx, du, both = base.gradients_together(base.put_together(dys, ws, 16), ws, columns, a)
        self.close(du, sum(product(dy, b) for dy, b in zip(dys, columns, strict=True)))
        self.close(dx, sum(product(dy, w.dequantise()) for dy, w in zip(dys, ws, strict=True)) + product(du, a))
        assert jnp.array_equal(both, jnp.pad(jnp.concatenate([*dys, du], axis=1), ((0, 0), (0, 32))))
