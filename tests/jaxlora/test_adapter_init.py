"""Fresh adapters are drawn from PEFT's distributions."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlora.adapt import LoRAConfig, attach
from jaxlora.nn.linear import Linear
from jaxlora.select import by_pattern
from jaxlora.weights.dense import Dense

RANK, IN, OUT = 32, 100, 48


class Wide(nnx.Module):
    def __init__(self):
        self.proj = Linear(IN, OUT, dtype=jnp.float32)
        self.proj.weight.set_value(Dense(jnp.zeros((OUT, IN))))


def drawn(**options):
    model = Wide()
    attach(model, by_pattern(["proj"], ["proj"]), LoRAConfig(**{"r": RANK, **options}))
    return model.proj.lora


def assert_uniform(draws, bound):
    """All within ±bound, up to it, and of the uniform distribution's deviation (5 standard errors)."""
    draws = np.asarray(draws)
    assert np.abs(draws).max() <= bound
    assert np.abs(draws).max() > 0.99 * bound
    assert draws.std() == pytest.approx(bound / 3**0.5, rel=5 * (1 / (5 * draws.size)) ** 0.5)
    assert abs(draws.mean()) < 5 * draws.std() / draws.size**0.5


def test_a_is_uniform_in_one_over_the_root_of_in():
    assert_uniform(drawn().a, IN**-0.5)


def test_b_is_zero():
    assert not np.any(drawn().b)


def test_without_the_zero_both_are_uniform_in_one_over_the_root_of_in():
    lora = drawn(init_lora_weights=False)
    assert_uniform(lora.a, IN**-0.5)
    assert_uniform(lora.b, RANK**-0.5)


def test_gaussian_a_has_deviation_one_over_the_rank():
    a = np.asarray(drawn(init_lora_weights="gaussian").a)
    assert a.std() == pytest.approx(1 / RANK, rel=5 * (1 / (2 * a.size)) ** 0.5)
    # A uniform draw would end at 1.73 deviations.
    assert np.abs(a).max() > 3 / RANK


def test_the_seed_decides_the_draw():
    assert np.array_equal(drawn(random_state=1).a, drawn(random_state=1).a)
    assert not np.array_equal(drawn(random_state=1).a, drawn(random_state=2).a)


@pytest.mark.parametrize(("options", "scale"), [({}, 0.5), ({"use_rslora": True}, 16 / 32**0.5), ({"lora_alpha": 64}, 2.0)])
def test_the_scale_is_alpha_over_the_rank_or_its_root(options, scale):
    assert float(drawn(**options).scale) == pytest.approx(scale, rel=1e-6)
