"""``project`` against its formula: values, every gradient, dropout, and what it keeps for the backward."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlora.nn import products as products_module
from jaxlora.nn.linear import Linear, project, project_activated
from jaxlora.weights import base
from jaxlora.weights.dense import Dense
from jaxlora.weights.int4 import Int4
from jaxlora.weights.lora import LoRA
from jaxlora.weights.nf4 import NF4
from pallas_kernels.functions import Function
from tests.tolerances import REORDERED_FP32

WIDTH, OUTS, RANKS = 20, (24, 8, 12), (4, None, 3)
SCALE = 1.7


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def make(i, *, rank, dropout=0.0, bias=True, weight=Dense, width=WIDTH):
    linear = Linear(width, OUTS[i], bias=bias, dtype=jnp.float32)
    dense = normal(10 + i, OUTS[i], width) / width**0.5
    linear.weight.set_value(Dense(dense) if weight is Dense else jax.jit(weight.quantise)(dense))
    if bias:
        linear.bias.set_value(normal(20 + i, OUTS[i]))
    if rank:
        linear.attach(LoRA(normal(30 + i, rank, width), normal(40 + i, OUTS[i], rank), jnp.float32(SCALE + i)), dropout=dropout)
    return linear


def group(**options):
    return [make(i, rank=rank, **options) for i, rank in enumerate(RANKS)]


def formula(linears, x, masks=None):
    """W x + s·B·A·(x ∘ mask) + bias, by autodiff."""
    ys = []
    for i, linear in enumerate(linears):
        y = x @ linear.weight.get_value().dequantise().T
        if linear.lora is not None:
            kept = x if masks is None else x * masks[i]
            y = y + linear.lora.scale * (kept @ linear.lora.a.T) @ linear.lora.b.T
        ys.append(y if linear.bias is None else y + linear.bias.get_value()[None])
    return tuple(ys)


def gradients(function, linears, x):
    """Of a weighted sum of the outputs: to x and to every leaf."""
    graphdef, state = nnx.split(tuple(linears))

    def loss(state, x):
        return sum(jnp.vdot(y, normal(50 + i, *y.shape)) for i, y in enumerate(function(nnx.merge(graphdef, state), x)))

    return jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(nnx.to_pure_dict(state), x)


def jitted(function, linears, x):
    graphdef, state = nnx.split(tuple(linears))
    return jax.jit(lambda state, x: function(nnx.merge(graphdef, state), x))(state, x)


def assert_close(ours, theirs, tolerance=10 * REORDERED_FP32):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        if a.dtype == jnp.float32 and "lora_scale" not in jax.tree_util.keystr(path):
            np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(("weight", "width"), [(Dense, 20), (Int4, 20), (NF4, 20), (Int4, 64), (NF4, 64)])
def test_values_are_the_formulas(weight, width):
    linears, x = group(weight=weight, width=width), normal(0, 5, width)
    assert_close(jitted(project, linears, x), jitted(formula, linears, x))


def test_every_gradient_of_dense_linears_is_the_formulas():
    linears, x = group(), normal(0, 5, WIDTH)
    assert_close(gradients(project, linears, x), gradients(formula, linears, x))


@pytest.mark.parametrize("weight", [Int4, NF4])
def test_gradients_of_adapters_and_input_are_the_formulas_over_packed_weights(weight):
    linears, x = group(weight=weight), normal(0, 5, WIDTH)
    (ours, dx), (theirs, dx_theirs) = gradients(project, linears, x), gradients(formula, linears, x)
    for i, rank in enumerate(RANKS):
        if rank:
            assert_close({k: ours[i][k] for k in ("lora_A", "lora_B")}, {k: theirs[i][k] for k in ("lora_A", "lora_B")})
    assert_close(dx, dx_theirs)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Products as GPUs have them, in traces that no other test gets and that come from none."""
    traces = products_module.all_products, products_module._project_bwd
    for trace in traces:
        trace.clear_cache()
    monkeypatch.setattr(base, "one_product", lambda width, columns: True)
    yield
    for trace in traces:
        trace.clear_cache()


@pytest.mark.parametrize(("width", "beside"), [(12, True), (WIDTH, False)], ids=["wide outputs", "others"])
def test_gradients_are_the_formulas_where_du_is_part_of_a_wide_product(monkeypatch, on_a_gpu, width, beside):
    """Outputs of 44 in all."""
    found = []
    monkeypatch.setattr(products_module, "gradients_beside", lambda *args: found.append(1) or base.gradients_beside(*args))
    ranks = (4, 2, 3) if beside else RANKS
    linears, x = [make(i, rank=rank, width=width) for i, rank in enumerate(ranks)], normal(0, 5, width)
    assert_close(gradients(project, linears, x), gradients(formula, linears, x))
    assert bool(found) == beside


@pytest.mark.parametrize(("weight", "ranks", "joined"), [(Int4, (4, 2, 3), True), (Int4, RANKS, False), (Dense, (4, 2, 3), False)])
def test_adapted_codes_of_one_input_are_one_product_on_a_gpu(monkeypatch, on_a_gpu, weight, ranks, joined):
    """Outputs of 44 in all from 64 columns."""
    found = []
    monkeypatch.setattr(products_module, "product_beside", lambda *args: found.append(len(args[0])) or base.product_beside(*args))
    linears, x = [make(i, rank=rank, weight=weight, width=64) for i, rank in enumerate(ranks)], normal(0, 5, 64)
    assert_close(jitted(project, linears, x), jitted(formula, linears, x))
    (ours, dx), (theirs, dx_theirs) = gradients(project, linears, x), gradients(formula, linears, x)
    assert_close(dx, dx_theirs)
    for i, rank in enumerate(ranks):
        if rank:
            assert_close({k: ours[i][k] for k in ("lora_A", "lora_B")}, {k: theirs[i][k] for k in ("lora_A", "lora_B")})
    assert (found == [len(ranks)]) == joined


def test_an_adapters_columns_are_not_computed_again_where_they_are_kept():
    """Of shape [5, 3]: A x in the forward, and dy B in the backward."""
    made, x = make(0, rank=3, bias=False), normal(0, 5, WIDTH)
    graphdef, state = nnx.split(made)
    kept = jax.checkpoint_policies.save_only_these_names("lora_u")

    def loss(state, x):
        y = jax.checkpoint(lambda state, x: jnp.sin(nnx.merge(graphdef, state)(x)), policy=kept)(state, x)
        return y.sum()

    text = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(nnx.to_pure_dict(state), x).compile().as_text()
    assert len(re.findall(r"= f32\[5,3\]\S* dot\(", text)) == 2


def test_leading_axes_are_kept():
    linears, x = group(), normal(0, 2, 3, WIDTH)
    for y, flat in zip(project(linears, x), project(linears, x.reshape(6, WIDTH)), strict=True):
        np.testing.assert_array_equal(y.reshape(6, -1), flat)


def test_a_group_of_one_is_the_call():
    linear, x = make(0, rank=4), normal(0, 5, WIDTH)
    np.testing.assert_array_equal(linear(x), project((linear,), x)[0])


def test_a_group_is_each_linear_alone():
    linears, x = group(), normal(0, 5, WIDTH)
    assert_close(project(linears, x), tuple(linear(x) for linear in linears))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_activated_projection_is_the_linear_of_the_activation(dropout):
    linear, e, g = make(0, rank=4, dropout=dropout), normal(0, 5, WIDTH), normal(1, 5, WIDTH)
    key = jax.random.key(3) if dropout else None

    def ours(linear, e, g):
        return project_activated(linear, Function("gated", "silu"), (e, g), key)

    def plain(linear, e, g):
        return linear(jax.nn.silu(e) * g, key)

    graphdef, state = nnx.split(linear)
    dy = normal(2, 5, OUTS[0])
    found, expected = (
        jax.grad(lambda state, e, g, f=f: jnp.vdot(f(nnx.merge(graphdef, state), e, g), dy), argnums=(0, 1, 2))(
            nnx.to_pure_dict(state), e, g
        )
        for f in (ours, plain)
    )
    np.testing.assert_array_equal(ours(linear, e, g), plain(linear, e, g))
    assert_close(found, expected)


def test_adapter_gradients_are_fp32_under_bf16_activations():
    linears = group(weight=Int4, bias=False)
    leaves, _ = gradients(project, linears, normal(0, 5, WIDTH).astype(jnp.bfloat16))
    assert {leaves[i][name].dtype.name for i, rank in enumerate(RANKS) if rank for name in ("lora_A", "lora_B")} == {"float32"}


def test_a_tied_linear_refuses_to_multiply():
    with pytest.raises(ValueError, match="tied to the embedding"):
        Linear(4, 8, tied=True)(jnp.zeros((1, 4)))


RATE = 0.3


def dropping():
    return [make(0, rank=4, dropout=RATE), make(1, rank=3), make(2, rank=3, dropout=RATE)]


def key_of(i):
    return jax.random.key(60 + i)


def with_keys(linears, x):
    return project(linears, x, [key_of(i) for i in range(3)])


def with_masks(linears, x):
    """The masks that forward and backward must share, drawn once."""
    masks = [
        jax.random.bernoulli(key_of(i), 1 - RATE, x.shape) / (1 - RATE) if linears[i].lora_dropout else jnp.ones(x.shape) for i in range(3)
    ]
    return formula(linears, x, masks)


class TestDropout:
    def test_gradients_use_the_mask_of_the_forward(self):
        linears, x = dropping(), normal(0, 5, WIDTH)
        assert_close(jitted(with_keys, linears, x), jitted(with_masks, linears, x))
        assert_close(gradients(with_keys, linears, x), gradients(with_masks, linears, x))

    def test_does_not_happen_without_keys(self):
        linears, x = dropping(), normal(0, 5, WIDTH)
        assert_close(project(linears, x), formula(linears, x))

    def test_keeps_the_expectation(self):
        linear, x = make(0, rank=4, dropout=RATE), normal(0, 2, WIDTH)
        draws = jax.vmap(lambda key: linear(x, key))(jax.random.split(jax.random.key(0), 4000))
        # Four standard errors of the mean.
        bound = 4 * np.asarray(draws).std(0) / 4000**0.5
        assert (np.abs(np.asarray(draws).mean(0) - linear(x)) <= bound + 1e-6).all()

    def test_keeps_the_share_that_the_rate_says(self):
        linear = Linear(4000, 4000, dtype=jnp.float32)
        linear.weight.set_value(Dense(jnp.zeros((4000, 4000))))
        linear.attach(LoRA(jnp.eye(4000), jnp.eye(4000), jnp.float32(1)), dropout=RATE)
        y = np.asarray(linear(jnp.ones((1, 4000)), key_of(0)))
        np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - RATE)], rtol=1e-6)
        assert abs((y > 0).mean() - (1 - RATE)) < 0.03


@pytest.mark.parametrize("weight", [Int4, NF4])
def test_no_decoded_weight_is_kept_for_the_backward(weight):
    out, width, rows = 96, 128, 5
    linear = Linear(width, out, dtype=jnp.float32)
    linear.weight.set_value(jax.jit(weight.quantise)(normal(0, out, width)))
    linear.attach(LoRA(normal(1, 4, width), normal(2, out, 4), jnp.float32(1)))
    graphdef, state = nnx.split(linear)
    _, vjp = jax.vjp(lambda a, x: nnx.merge(graphdef, {**nnx.to_pure_dict(state), "lora_A": a})(x), linear.lora.a, normal(3, rows, width))
    kept = [leaf for leaf in jax.tree.leaves(vjp) if leaf.dtype != jnp.uint8]
    assert kept
    assert max(leaf.size for leaf in kept) < out * width


def test_a_dense_weight_returns_its_gradient():
    linear, x, dy = make(0, rank=4, bias=False), normal(0, 5, WIDTH), normal(1, 5, OUTS[0])
    graphdef, state = nnx.split(linear)
    gradient = jax.grad(lambda state: jnp.vdot(nnx.merge(graphdef, state)(x), dy))(nnx.to_pure_dict(state))
    np.testing.assert_allclose(gradient["weight"].array, dy.T @ x, rtol=1e-5, atol=1e-5)
