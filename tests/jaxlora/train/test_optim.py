import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.train.optim import OptimConfig, optimizer, schedule


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
