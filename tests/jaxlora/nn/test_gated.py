"""A gated MLP through a kernel that makes both projections and their product in one pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlora.adapt import LoRAConfig, attach, partition, select_from
from jaxlora.models import registry
from jaxlora.nn import linear as linear_module
from jaxlora.nn import products as products_module
from jaxlora.nn.linear import making_inputs
from jaxlora.nn.mlp import GeGLU, PlainMLP, SwiGLU
from jaxlora.nn.stack import edit_linears
from jaxlora.select import by_flags
from jaxlora.train.remat import execution
from jaxlora.train.step import value_and_grad
from jaxlora.weights.dense import Dense
from jaxlora.weights.float8 import Float8
from jaxlora.weights.int4 import Int4
from jaxlora.weights.lora import LoRA
from jaxlora.weights.nf4 import NF4
from pallas_kernels import _tuned
from pallas_kernels.lora_swiglu import KERNEL
from tests.jaxlora.models.test_parity import text_batch
from tests.jaxlora.nn.test_linear import assert_close
from tests.pallas_kernels import h200

WIDTH, HIDDEN = 64, 96


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def mlp(kind=SwiGLU, weight=Dense, ranks=(4, 3, 2), dropout=0.0):
    made = kind(WIDTH, HIDDEN, dtype=jnp.float32)
    for i, (linear, rank) in enumerate(zip((made.gate_proj, made.up_proj, made.down_proj), ranks, strict=True)):
        out, features = linear.features
        dense = normal(i, out, features) / features**0.5
        linear.weight.set_value(Dense(dense) if weight is Dense else weight.quantise(dense))
        if rank:
            linear.attach(LoRA(normal(10 + i, rank, features) / 8, normal(20 + i, out, rank), jnp.float32(0.5 + i)), dropout=dropout)
    return made


def value_and_gradients(made):
    graphdef, state = nnx.split(made)

    def loss(state, x):
        y = nnx.merge(graphdef, state)(x)
        return jnp.vdot(y, normal(40, *y.shape)), y

    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)(
        nnx.to_pure_dict(state), normal(30, 2, 5, WIDTH)
    )
    return y, gradients


@pytest.fixture
def fused(monkeypatch):
    """Takes the fused path with the backend that runs anywhere."""
    return lambda: monkeypatch.setattr(linear_module, "_gated_backend", lambda *_: "xla")


@pytest.mark.parametrize(
    ("kind", "weight", "ranks"),
    [(SwiGLU, Dense, (4, 3, 2)), (GeGLU, Int4, (4, 3, 2)), (SwiGLU, NF4, (4, 4, None)), (GeGLU, Dense, (None, None, None))],
)
def test_the_fused_path_is_the_other_one(kind, weight, ranks, fused):
    expected = value_and_gradients(mlp(kind, weight, ranks))
    fused()
    assert_close(value_and_gradients(mlp(kind, weight, ranks)), expected)


@pytest.mark.parametrize(("kind", "weight"), [(SwiGLU, Dense), (GeGLU, Int4), (SwiGLU, NF4)])
def test_the_path_of_one_pass_over_wide_gradients_is_the_other_one(kind, weight, in_one_pass):
    expected = value_and_gradients(mlp(kind, weight))
    ran = in_one_pass()
    assert_close(value_and_gradients(mlp(kind, weight)), expected)
    assert ran["gated_gradients"]


def plain_mlp():
    """Of one kind of activation, with biases."""
    made = PlainMLP(WIDTH, HIDDEN, activation="quick_gelu", dtype=jnp.float32)
    for i, linear in enumerate((made.fc1, made.fc2)):
        out, features = linear.features
        linear.weight.set_value(Dense(normal(i, out, features) / features**0.5))
        linear.bias.set_value(normal(60 + i, out))
        linear.attach(LoRA(normal(10 + i, 2 + i, features) / 8, normal(20 + i, out, 2 + i), jnp.float32(0.5 + i)), dropout=0.0)
    return made


@pytest.mark.parametrize("form", [Dense, Int4.quantise, NF4.quantise], ids=["dense", "int4", "nf4"])
@pytest.mark.parametrize("rounded", ["all", "first", "last"])
@pytest.mark.parametrize(("kind", "kernel"), [(mlp, "gated_gradients"), (plain_mlp, "plain_gradients")])
def test_the_path_of_products_that_are_scaled_afterwards_is_the_other_one(kind, kernel, rounded, form, in_one_pass):
    """Also by the weights that stay as they were."""

    def made():
        made = kind()
        last = made.down_proj if kind is mlp else made.fc2
        for linear in {"all": (*made.inputs, last), "first": made.inputs, "last": (last,)}[rounded]:
            linear.weight.set_value(Float8.of(form(linear.weight.get_value().dequantise())))
        return made

    with making_inputs(True):
        expected = value_and_gradients(made())
        ran = in_one_pass(kernel, "adapted_activation")
        assert_close(value_and_gradients(made()), expected)
    assert ran[kernel] and bool(ran["adapted_activation"]) == (rounded != "last")


@pytest.mark.parametrize("form", [Dense, Int4.quantise, NF4.quantise], ids=["dense", "int4", "nf4"])
@pytest.mark.parametrize(("kind", "kernel"), [(mlp, "gated_gradients"), (plain_mlp, "plain_gradients")])
def test_first_products_that_a_later_pass_adapts_are_the_other_ones(kind, kernel, form, in_one_pass):
    """Also by the weights that are trained."""

    def made():
        made = kind()
        for linear in (*made.inputs, made.down_proj if kind is mlp else made.fc2):
            linear.weight.set_value(form(linear.weight.get_value().dequantise()))
        return made

    with making_inputs(True):
        expected = value_and_gradients(made())
        ran = in_one_pass(kernel, "adapted_activation", "lora_input")
        assert_close(value_and_gradients(made()), expected)
    assert ran[kernel] == ran["adapted_activation"] == 1


@pytest.mark.parametrize("rows", [products_module._MANY_CONTRACTED, products_module._MANY_CONTRACTED - 1])
def test_a_few_columns_are_multiplied_either_way_around(rows):
    dy, b = normal(0, 3, rows), normal(1, rows, 2)
    np.testing.assert_allclose(products_module._narrow_product(dy, b), dy @ b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("reason", ["one adapter less", "a bias", "dropout"])
def test_one_pass_is_not_all_there_is_to_other_mlps(reason, in_one_pass):
    made = mlp(ranks=(4, 3, None) if reason == "one adapter less" else (4, 3, 2), dropout=0.5 if reason == "dropout" else 0.0)
    if reason == "a bias":
        made.up_proj.bias = nnx.data(nnx.Param(normal(50, HIDDEN)))
    keys = {"up_proj": jax.random.key(0)} if reason == "dropout" else None
    expected, ran = made(normal(30, 5, WIDTH), keys), in_one_pass()
    np.testing.assert_array_equal(made(normal(30, 5, WIDTH), keys), expected)
    jax.grad(lambda x: made(x, keys).sum())(normal(30, 5, WIDTH))
    assert not ran["gated_gradients"]


@pytest.mark.parametrize(
    "options", [{"ranks": (4, None, 2)}, {"dropout": 0.5}, {"packed": False}], ids=["one adapter", "dropout", "no packed form"]
)
def test_what_a_kernel_cannot_do_goes_the_other_way(options, monkeypatch):
    made = mlp(**{name: value for name, value in options.items() if name != "packed"})
    if "packed" in options:
        monkeypatch.setattr(Dense, "packed", lambda self: None)
    chosen = []
    monkeypatch.setattr(linear_module, "GATED", dataclasses.replace(KERNEL, refuses=lambda name, *_, **__: chosen.append(name)))
    keys = (jax.random.key(0),) * 2
    assert linear_module._gated_backend((made.gate_proj, made.up_proj), normal(0, 5, WIDTH), "silu", keys) is None and not chosen


def int4_llama():
    """A Llama of two int4 layers whose sizes Mosaic takes, all zeros."""
    spec = registry.get("llama")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    model = spec.build(spec.read({**spec.tiny, **sizes, "num_hidden_layers": 2, "attention_bias": False, "mlp_bias": False}))

    def pack(path, linear):
        if linear.weight is not None:
            linear.weight.set_value(Int4.abstract(linear.features, jnp.bfloat16))

    edit_linears(model, pack)
    nnx.update(model, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), nnx.to_pure_dict(nnx.state(model))))
    return model


def gradient_text(remat, monkeypatch):
    """The lowered gradient of an adapted ``int4_llama`` on an H200 where Mosaic was measured to be fastest."""
    model = int4_llama()
    attach(model, select_from(model, by_flags), LoRAConfig(r=4))
    graphdef, trainable, frozen = partition(model)
    batch = jax.tree.map(lambda a: a[None], text_batch("llama"))
    monkeypatch.setattr(_tuned, "fastest", lambda name: "mosaic" if name == "lora_swiglu" else None)
    run = execution(remat, attention="xla")
    return h200.lowered_text(lambda *trees: value_and_grad(graphdef, *trees, run), trainable, frozen, batch)


@pytest.mark.parametrize(("remat", "runs"), [(True, 2), ("dots", 1)])
def test_the_kernel_is_once_in_a_layer_and_again_only_where_its_output_is_recomputed(remat, runs, monkeypatch):
    assert gradient_text(remat, monkeypatch).count("stablehlo.custom_call @mosaic_gpu_v2") == runs
