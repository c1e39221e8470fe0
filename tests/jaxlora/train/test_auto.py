"""The policy that fits is taken, in the order of speed; the choice is kept on disk; where none fits the table says why."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxlora.train import auto
from jaxlora.train.remat import execution

ROWS = {"dots": 4000, "attention": 3000, True: 2000, "unsloth": 1000}


def lowered(policy):
    """A program whose temporaries grow with what the policy is said to cost."""

    def step(x):
        big = jnp.broadcast_to(x[:1], (ROWS[policy], x.shape[0])) * jnp.arange(ROWS[policy], dtype=x.dtype)[:, None]
        return jnp.sort(big, axis=0)[:, 0].sum()

    return jax.jit(step).lower(jax.ShapeDtypeStruct((1000,), jnp.float32))


@functools.cache
def needs():
    """GiB of each policy's program."""
    return {policy: auto.needed_gib(lowered(policy).compile()) for policy in ROWS}


@pytest.fixture
def compiled():
    """``lowered``, and the list of policies that were compiled."""
    count = []

    class Counted:
        def __init__(self, policy):
            self.policy, self.inner = policy, lowered(policy)
            self.as_text = self.inner.as_text

        def compile(self):
            count.append(self.policy)
            return self.inner.compile()

    return Counted, count


def test_more_memory_buys_the_faster_policy(compiled):
    lower, _ = compiled
    sizes = needs()
    assert sizes["dots"] > sizes["attention"] > sizes[True] > sizes["unsloth"] > 0
    for policy in auto.CANDIDATES:
        assert auto.choose(lower, sizes[policy]).policy == policy


def test_nothing_is_compiled_after_the_first_that_fits(compiled):
    lower, count = compiled
    auto.choose(lower, needs()[True])
    assert count == ["dots", "attention", True]


def test_a_kept_choice_compiles_nothing_and_another_limit_chooses_again(compiled, tmp_path):
    lower, count = compiled
    first = auto.choose(lower, needs()[True], cache=tmp_path / "remat.json")
    again = auto.choose(lower, needs()[True], cache=tmp_path / "remat.json")
    assert (again.policy, again.describe()) == (first.policy, first.describe()) and count == ["dots", "attention", True]
    assert auto.choose(lower, needs()["unsloth"], cache=tmp_path / "remat.json").policy == "unsloth"


def test_a_broken_cache_is_only_a_warning(compiled, tmp_path, caplog):
    (tmp_path / "remat.json").write_text("{")
    assert auto.choose(compiled[0], 1.0, cache=tmp_path / "remat.json").policy == "dots"
    assert "not readable" in caplog.text


def test_where_none_fits_the_error_is_the_table(compiled):
    table = r"0\.0 GiB: 'dots' needs .*; 'attention' needs .*; True needs .*; 'unsloth' needs .*lower per_device_train"
    with pytest.raises(ValueError, match=table):
        auto.choose(compiled[0], 1e-6)


@pytest.mark.parametrize("policy", auto.CANDIDATES)
def test_every_candidate_is_a_policy(policy):
    assert execution(policy).scan.checkpoint
