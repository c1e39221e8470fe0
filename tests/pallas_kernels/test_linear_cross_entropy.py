import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_cross_entropy

# The package attribute of that name is the function.
module = importlib.import_module("pallas_kernels.linear_cross_entropy")


def arguments(n=24, d=8, v=32, labelled=24, seed=0):
    draw = np.random.default_rng(seed)
    hidden = jnp.asarray(draw.standard_normal((n, d)), jnp.float32)
    weight = jnp.asarray(draw.standard_normal((v, d)), jnp.float32)
    labels = np.full(n, -100, np.int32)
    labels[draw.permutation(n)[:labelled]] = draw.integers(0, v, labelled)
    return hidden, weight, jnp.asarray(labels)


def test_of_equal_logits_the_loss_is_log_v_a_token():
    hidden, weight, labels = arguments(labelled=10, v=32)
    assert jnp.allclose(
        linear_cross_entropy(hidden, jnp.zeros_like(weight), labels, weight_grad=False, chunk=4), 10 * jnp.log(32.0), rtol=1e-6
    )


@pytest.mark.parametrize("labelled, expected", [(0, 0), (1, 1), (8, 1), (9, 2), (24, 3)])
def test_chunks_run_are_labelled_tokens_over_chunk_rounded_up(monkeypatch, labelled, expected):
    ran = []
    original = module._chunk
    monkeypatch.setattr(module, "_chunk", lambda *args: ran.append(1) or original(*args))
    # Without jit a loop calls its body once a trip.
    with jax.disable_jit():
        linear_cross_entropy(*arguments(labelled=labelled), weight_grad=False, chunk=8)
    assert len(ran) == expected


def test_unlabelled_hidden_states_are_not_read():
    hidden, weight, labels = arguments(labelled=10)
    poisoned = jnp.where((labels == -100)[:, None], jnp.nan, hidden)
    found = linear_cross_entropy(poisoned, weight, labels, weight_grad=False, chunk=8)
    assert found == linear_cross_entropy(hidden, weight, labels, weight_grad=False, chunk=8)


def test_another_ignore_index_is_obeyed():
    hidden, weight, labels = arguments(labelled=10)
    found = linear_cross_entropy(hidden, weight, jnp.where(labels == -100, -1, labels), weight_grad=False, ignore_index=-1)
    assert found == linear_cross_entropy(hidden, weight, labels, weight_grad=False)


@pytest.mark.parametrize("label", [-1, 32])
def test_a_label_outside_the_vocabulary_makes_the_loss_nan(label):
    hidden, weight, labels = arguments(v=32)
    assert jnp.isnan(linear_cross_entropy(hidden, weight, labels.at[3].set(label), weight_grad=False))


@pytest.mark.parametrize("scale", [1.0, 1e4, -1e4])
def test_logits_of_any_size_have_a_finite_loss(scale):
    """Rows of one huge logit, of none, and of logits that are alike."""
    hidden = jnp.concatenate([jnp.eye(4) * scale, jnp.zeros((1, 4)), jnp.full((1, 4), scale)])
    weight, labels = jnp.concatenate([jnp.eye(4), -jnp.eye(4)]), jnp.arange(6)
    value = linear_cross_entropy(hidden, weight, labels, weight_grad=True)
    np.testing.assert_allclose(value, module.reference(hidden, weight, labels, weight_grad=True), rtol=1e-6)


def test_a_frozen_head_gets_a_zero_gradient():
    hidden, weight, labels = arguments()
    assert not jnp.any(jax.grad(lambda w: linear_cross_entropy(hidden, w, labels, weight_grad=False))(weight))


def test_gradients_scale_with_the_cotangent():
    hidden, weight, labels = arguments(labelled=10)

    def gradient(factor):
        return jax.grad(lambda h: factor * linear_cross_entropy(h, weight, labels, weight_grad=False))(hidden)

    assert jnp.allclose(gradient(0.125), 0.125 * gradient(1.0), rtol=1e-6)


@pytest.mark.parametrize("weight_grad", [False, True])
def test_peak_memory_is_a_few_chunks_of_logits_and_no_more(weight_grad):
    n, d, v, chunk = 4096, 64, 32_000, 512
    shapes = [jax.ShapeDtypeStruct((n, d), jnp.float32), jax.ShapeDtypeStruct((v, d), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.int32)]

    def loss(hidden, weight, labels):
        return linear_cross_entropy(hidden, weight, labels, weight_grad=weight_grad, chunk=chunk)

    temp = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    # A chunk's logits and g, and the head and hidden states with their sums.
    bound = 4 * (2 * chunk * v + 2 * v * d + 2 * n * d)
    assert temp < bound < 4 * n * v / 3


def test_without_differentiation_no_gradient_is_computed():
    hidden, weight, labels = arguments()
    text = str(jax.make_jaxpr(lambda *args: linear_cross_entropy(*args, weight_grad=True, chunk=8))(hidden, weight, labels))
    assert text.count("dot_general") == 1


def test_all_faults_of_a_call_are_named_together():
    hidden, weight, labels = arguments()
    with pytest.raises(ValueError, match=r"chunk must be at least 1.*softcap must be positive"):
        linear_cross_entropy(hidden, weight, labels, weight_grad=False, chunk=0, softcap=-1.0)


@pytest.mark.parametrize(
    ("how", "rank", "bare"),
    [({}, 0, True), ({"softcap": 5.0}, 0, False), ({"logit_scale": 0.5}, 0, False), ({}, 2, False)],
    ids=["bare", "capped", "scaled", "adapted"],
)
def test_a_kernel_sums_up_logits_that_are_there_and_no_others(monkeypatch, how, rank, bare):
    """Others XLA makes anew as it reads them; for a kernel they would be written first."""
    asked = []
    original = module.logsumexp
    monkeypatch.setattr(module, "logsumexp", lambda t, *, backend: asked.append(backend) or original(t, backend=backend))
    lora = (jnp.ones((rank, 8)), jnp.ones((32, rank)), jnp.float32(0.5)) if rank else None
    with jax.disable_jit():
        linear_cross_entropy(*arguments(), weight_grad=False, lora=lora, **how)
    assert asked and set(asked) == {"auto" if bare else "xla"}
