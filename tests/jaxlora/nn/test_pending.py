"""Norms and activations that their Linears make, against the same model without: the value and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlora.adapt import LoRAConfig, attach, fill_adapters, partition
from jaxlora.nn.decoder import Execution
from jaxlora.nn.linear import Linear, making_inputs, project, project_mlp
from jaxlora.nn.norm import RMSNorm, branch
from jaxlora.nn.pending import Pending, fork
from jaxlora.nn.stack import flatten, flatten_leaves, linear_paths, nest
from jaxlora.select import by_flags
from jaxlora.train.remat import execution
from jaxlora.weights.dense import Dense
from jaxlora.weights.float8 import Float8
from jaxlora.weights.int4 import Int4
from jaxlora.weights.lora import LoRA
from pallas_kernels.functions import Function
from tests.jaxlora import reference
from tests.jaxlora.models import llava, mllama, qwen_vl, test_parity
from tests.jaxlora.nn.test_linear import assert_close, normal
from tests.tolerances import REORDERED_FP32

MODELS = {
    **{name: (lambda name=name: test_parity.text_batch(name)) for name in ("llama", "qwen3", "gemma2")},
    **{name: (lambda name=name: qwen_vl.micro(name)) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
    **{name: (lambda name=name: llava.micro(name)) for name in ("llava_siglip", "mistral3")},
    "mllama": mllama.micro,
}
GATELESS = ("qwen2_vl", "qwen3_vl", "llava_siglip", "mllama")


def value_and_gradients(name, run):
    """The mean square of an adapted model's logits, with its gradient by every parameter."""
    model, batch = reference.fresh(name, dtype="float32").model, MODELS[name]()
    attach(model, by_flags(linear_paths(model), targets="all-linear"), LoRAConfig(r=4))
    shapes = {path: leaf.shape for path, leaf in flatten(nnx.to_pure_dict(nnx.state(model))).items() if "lora" in path}
    draw = np.random.default_rng(0)
    fill_adapters(model, lambda path, leaf: draw.normal(0, 0.2, shapes[f"{path}.{leaf}"]))
    graphdef, trainable, frozen = partition(model, full=True)

    def loss(trainable):
        model = nnx.merge(graphdef, nest({**flatten_leaves(trainable), **flatten_leaves(frozen)}))
        return jnp.mean(jnp.square(model.head().logits(model(batch, run)[0])))

    value, gradients = jax.jit(jax.value_and_grad(loss))(trainable)
    # Softmax does not see a bias of k.
    return value, {path: leaf for path, leaf in flatten(gradients).items() if not path.endswith("k_proj.bias")}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_the_same_where_kernels_make_the_inputs_of_its_linears(name, in_one_pass):
    """Also by the weights of its norms."""
    expected = value_and_gradients(name, Execution())
    ran = in_one_pass("lora_input", "gated_gradients", "plain_gradients", "norm_gradient")
    assert_close(value_and_gradients(name, execution("dots")), expected, 40 * REORDERED_FP32)
    assert ran["norm_gradient"] and ran["lora_input"] > ran["norm_gradient"]
    # This Llama's gate has a bias.
    assert bool(ran["gated_gradients"]) == (name != "llama") and bool(ran["plain_gradients"]) == (name in GATELESS)


@pytest.mark.parametrize("policy", [False, True, "unsloth"])
def test_kernels_make_no_inputs_where_products_are_computed_again(policy, in_one_pass):
    ran = in_one_pass("lora_input", "gated_gradients", "plain_gradients", "norm_gradient")
    value_and_gradients("qwen2_vl", execution(policy))
    assert ran["gated_gradients"] and not any(ran[name] for name in ("lora_input", "plain_gradients", "norm_gradient"))


@pytest.fixture
def made():
    """As with "dots"."""
    with making_inputs(True):
        yield


def linear(seed, out, width=64, rank=4, weight=Dense, dtype=jnp.float32):
    made = Linear(width, out, dtype=dtype)
    dense = (normal(seed, out, width) / width**0.5).astype(dtype)
    made.weight.set_value(Dense(dense) if weight is Dense else weight.quantise(dense))
    if rank:
        made.attach(LoRA(normal(seed + 1, rank, width) / 8, normal(seed + 2, out, rank), jnp.float32(1.5)))
    return made


@pytest.mark.parametrize(
    ("outs", "weight"),
    [((64,), Dense), ((96, 96), Int4), ((32, 16), Int4), ((160,), Dense)],
    ids=["one", "wide", "joined", "one wide"],
)
def test_groups_of_linears_take_a_pending_norm(outs, weight, in_one_pass, made):
    linears = [linear(10 * i, out, weight=weight) for i, out in enumerate(outs)]
    norm = RMSNorm(64, eps=1e-5, dtype=jnp.float32)
    norm.weight.set_value(1 + normal(90, 64) / 8)

    def loss(x):
        past, normed = branch(norm, x, linears, None)
        ys = project(linears, normed)
        return sum(jnp.vdot(y, normal(50 + i, *y.shape)) for i, y in enumerate(ys)) + jnp.vdot(past, normal(60, *x.shape)), normed

    x = normal(70, 2, 5, 64)
    expected = jax.grad(lambda x: loss(x)[0])(x)
    in_one_pass("lora_input", "norm_gradient")
    assert isinstance(loss(x)[1], Pending)
    assert_close(jax.grad(lambda x: loss(x)[0])(x), expected)


@pytest.mark.parametrize("reason", ["one adapter less", "dropout", "few rows"])
def test_a_norm_is_computed_apart_for_others(reason, in_one_pass, made, monkeypatch):
    linears = [linear(0, 32), linear(10, 32, rank=0 if reason == "one adapter less" else 4)]
    linears[0].lora_dropout = 0.5 if reason == "dropout" else 0.0
    norm = RMSNorm(64, eps=1e-5, dtype=jnp.float32)
    norm.weight.set_value(jnp.ones(64))
    in_one_pass("lora_input", "norm_gradient")
    if reason == "few rows":
        monkeypatch.setattr("jaxlora.nn.products.MANY_ROWS", 6)
    _, normed = branch(norm, normal(0, 5, 64), linears, {"q_proj": jax.random.key(0)} if reason == "dropout" else None)
    assert not isinstance(normed, Pending)


@pytest.mark.parametrize("making", [False, True])
@pytest.mark.parametrize("block", ["projections", "mlp"])
def test_a_pending_norm_puts_the_gradient_of_products_in_e4m3_together(block, making, in_one_pass, monkeypatch):
    """By x, by the norm's weight and by the adapters; with "dots" a kernel makes the norm too."""
    monkeypatch.setattr("jaxlora.nn.products.MANY_ROWS", 1)
    loras = [linear(10 * i, 64, weight=Int4).lora for i in range(3)]

    def loss(x, weight, loras):
        linears = [linear(10 * i, 64, weight=Int4) for i in range(3)]
        norm = RMSNorm(64, eps=1e-5, dtype=jnp.float32)
        norm.weight.set_value(weight)
        for each, lora in zip(linears, loras, strict=True):
            each.weight.set_value(Float8.of(each.weight.get_value()))
            each.attach(lora)
        past, normed = branch(norm, x, linears if block == "projections" else linears[:2], None)
        ys = project(linears, normed) if block == "projections" else [project_mlp(linears, normed, "silu", (None,) * 3)]
        return sum(jnp.vdot(y, normal(50 + i, *y.shape)) for i, y in enumerate(ys)) + jnp.vdot(past, normal(60, *x.shape))

    def gradients():
        with making_inputs(making):
            return jax.grad(loss, argnums=(0, 1, 2))(normal(70, 2, 5, 64), 1 + normal(90, 64) / 8, loras)

    in_one_pass("adapted_activation", "gated_gradients")
    expected = gradients()
    ran = in_one_pass("norm_gradient", "lora_input")
    assert_close(gradients(), expected)
    assert ran["norm_gradient"] == 1 and ran["lora_input"] == making


def test_the_value_of_a_pending_norm_has_the_norms_gradient():
    x, weight, function = normal(0, 3, 8), normal(1, 1, 8), Function("rms_norm", eps=1e-5)

    def loss(x, weight):
        past, normed = fork(function, (x, weight))
        return jnp.vdot(normed.value(), normal(2, 3, 8)) + jnp.vdot(past, normal(3, 3, 8))

    def plain(x, weight):
        return jnp.vdot(function(x, weight), normal(2, 3, 8)) + jnp.vdot(x, normal(3, 3, 8))

    assert_close(jax.grad(loss, argnums=(0, 1))(x, weight), jax.grad(plain, argnums=(0, 1))(x, weight))


def test_a_small_update_is_not_swallowed_by_a_rounded_product(in_one_pass, made):
    """An adapter that moves y by less than half a unit in the last place of bfloat16 moves it on the average.

    Where its part is added to a product that is rounded already, as without kernels and in PEFT, y stays where it is.
    """

    def slope():
        adapted = linear(0, 48, width=256, dtype=jnp.bfloat16)
        lora, x = adapted.lora, normal(5, 4000, 256)
        small = LoRA(lora.a, lora.b * 5e-5, lora.scale)
        adapted.attach(small)
        norm = RMSNorm(256, eps=1e-5, dtype=jnp.bfloat16)
        norm.weight.set_value(jnp.ones(256, jnp.bfloat16))
        moved = adapted(branch(norm, x.astype(jnp.bfloat16), (adapted,), None)[1]).astype(jnp.float32)
        adapted.attach(LoRA(lora.a, lora.b * 0, lora.scale))
        still = adapted(branch(norm, x.astype(jnp.bfloat16), (adapted,), None)[1]).astype(jnp.float32)
        normed = norm(x.astype(jnp.bfloat16)).astype(jnp.float32)
        exact = normed @ small.a.T @ (small.scale * small.b).T
        return float(jnp.vdot(moved - still, exact) / jnp.vdot(exact, exact))

    assert slope() < 0.3
    in_one_pass("lora_input", "norm_gradient")
    assert 0.9 < slope() < 1.1
