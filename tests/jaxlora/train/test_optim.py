import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.adapt import partition
from jaxlora.models import registry
from jaxlora.nn.stack import flatten_leaves
from jaxlora.select import expand
from jaxlora.train.optim import OptimConfig, decayed, optimizer, schedule
from tests.jaxlora.reference import run_oracle


def expected_rate(kind, t, warmup, total):
    """The multipliers of transformers' get_linear/cosine/constant schedules (transformers/optimization.py), as formulas."""
    if kind != "constant" and t < warmup:
        return t / max(1, warmup)
    if kind == "linear":
        return max(0.0, (total - t) / max(1, total - warmup))
    if kind == "cosine":
        return max(0.0, 0.5 * (1 + math.cos(math.pi * (t - warmup) / max(1, total - warmup))))
    return 1.0


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_rates_are_transformers(kind, warmup):
    rate = schedule(OptimConfig(learning_rate=2e-4, lr_scheduler_type=kind, warmup_steps=warmup, total_steps=20))
    for t in range(21):
        assert float(rate(t)) == pytest.approx(2e-4 * expected_rate(kind, t, warmup, 20), rel=1e-5, abs=1e-12), t


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_steps_are_adamw_with_decoupled_decay_after_clipping(max_grad_norm):
    config = OptimConfig(
        learning_rate=0.1, lr_scheduler_type="linear", total_steps=4, weight_decay=0.01, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-3,
        max_grad_norm=max_grad_norm,
    )  # fmt: skip
    tx, w = optimizer(config), np.array([1.0, -2.0, 0.5])
    params, m, v = {"w": jnp.asarray(w, jnp.float32)}, 0.0, 0.0
    state = tx.init(params)
    for t, g in enumerate(np.random.default_rng(0).standard_normal((4, 3)) * 3):
        updates, state = tx.update({"w": jnp.asarray(g, jnp.float32)}, state, params)
        params = {"w": params["w"] + updates["w"]}
        norm = np.linalg.norm(g)
        g = g * min(1.0, max_grad_norm / norm) if max_grad_norm else g
        m, v, rate = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2, 0.1 * (4 - t) / 4
        w = w * (1 - rate * 0.01) - rate * (m / (1 - 0.8 ** (t + 1))) / (np.sqrt(v / (1 - 0.9 ** (t + 1))) + 1e-3)
        np.testing.assert_allclose(params["w"], w, rtol=1e-5)


def test_an_unknown_schedule_names_the_nearest():
    with pytest.raises(ValueError, match="got 'cosin'; did you mean 'cosine'"):
        OptimConfig(lr_scheduler_type="cosin")


def test_negative_warmup_is_an_error():
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        OptimConfig(warmup_steps=-1)


VECTOR, MATRIX = jnp.ones(4), jnp.ones((2, 4))
STACK, STACKED = "model.layers.0:2:1", jnp.ones((2, 4))


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"q_proj": {"lora_A": MATRIX, "lora_B": MATRIX}}, {"q_proj.lora_A", "q_proj.lora_B"}),
        ({"embed_tokens": {"weight": MATRIX}, "lm_head": {"weight": MATRIX}}, {"embed_tokens.weight", "lm_head.weight"}),
        ({"q_proj": {"weight": MATRIX, "bias": VECTOR}}, {"q_proj.weight"}),
        ({"input_layernorm": {"weight": VECTOR}, "norm": {"weight": VECTOR}, "k_norm": {"weight": VECTOR}}, set()),
        ({"ln_q": {"weight": VECTOR, "bias": VECTOR}, "norm1": {"weight": VECTOR}}, {"norm1.weight"}),
        (
            {STACK: {"ln": {"weight": STACKED, "bias": STACKED}, "up": {"weight": jnp.ones((2, 3, 4))}}},
            {f"{STACK}.up.weight"},
        ),
    ],
)
def test_norms_and_biases_do_not_decay(tree, expected):
    assert {path for path, decays in flatten_leaves(decayed(tree)).items() if decays} == expected


def test_decay_moves_what_it_should_and_nothing_else():
    params = {"up": {"weight": MATRIX}, "norm": {"weight": VECTOR}}
    tx = optimizer(OptimConfig(learning_rate=0.1, weight_decay=0.5, lr_scheduler_type="constant"))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["up"]["weight"], -0.1 * 0.5 * MATRIX, rtol=1e-6)
    assert not updates["norm"]["weight"].any()


def test_embedding_and_head_have_their_own_rate():
    params = {"embed_tokens": {"weight": MATRIX}, "lm_head": {"weight": MATRIX, "lora_A": MATRIX}, "q_proj": {"lora_A": MATRIX}}
    schedule_of = {"lr_scheduler_type": "linear", "total_steps": 4, "adam_beta2": 0.9, "adam_epsilon": 0.0, "max_grad_norm": 0.0}
    tx = optimizer(OptimConfig(learning_rate=0.1, embedding_learning_rate=0.02, **schedule_of))
    state = tx.init(params)
    for rate in (1.0, 0.75):
        # Adam's step under a constant gradient is the rate, whatever the gradient.
        updates, state = tx.update(jax.tree.map(lambda p: 3 * jnp.ones_like(p), params), state, params)
        for path, update in flatten_leaves(updates).items():
            peak = 0.02 if path in ("embed_tokens.weight", "lm_head.weight") else 0.1
            np.testing.assert_allclose(update, -rate * peak * jnp.ones_like(update), rtol=1e-5, err_msg=path)


def test_a_rate_for_embeddings_that_are_not_trained_is_an_error():
    with pytest.raises(ValueError, match="neither embed_tokens nor lm_head is trained whole: add them to modules_to_save"):
        optimizer(OptimConfig(embedding_learning_rate=1e-5)).init({"q_proj": {"lora_A": MATRIX}})


@pytest.mark.oracle
def test_the_decayed_names_are_transformers_for_every_architecture(tmp_path):
    specs = {name: registry.get(name) for name in registry.MODELS}
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps({name: {"architecture": spec.architecture, "config": dict(spec.tiny)} for name, spec in specs.items()}))
    run_oracle("decay_names.py", jobs, tmp_path / "names.json")
    for name, names in json.loads((tmp_path / "names.json").read_text()).items():
        model = specs[name].build(specs[name].read(specs[name].tiny), dtype=jnp.float32)
        marks = flatten_leaves(decayed(partition(model, full=True)[1]))
        assert {path for stacked, decays in marks.items() if decays for path in expand(stacked)} == set(names), name
