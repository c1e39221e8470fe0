"""The policy that fits is taken, in the order of speed; the choice is kept on disk; where none fits the table says why."""

import functools
import types

import jax
import jax.numpy as jnp
import pytest

from jaxlora.nn import host
from jaxlora.train import auto
from jaxlora.train.remat import execution

ROWS = {"dots": 4000, "attention": 3000, "unsloth": 2000, True: 1000}


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
    assert sizes["dots"] > sizes["attention"] > sizes["unsloth"] > sizes[True] > 0
    for policy in auto.CANDIDATES:
        assert auto.choose(lower, sizes[policy]).policy == policy


def test_nothing_is_compiled_after_the_first_that_fits(compiled):
    lower, count = compiled
    auto.choose(lower, needs()["unsloth"])
    assert count == ["dots", "attention", "unsloth"]


def test_a_kept_choice_compiles_nothing_and_another_limit_chooses_again(compiled, tmp_path):
    lower, count = compiled
    first = auto.choose(lower, needs()["unsloth"], cache=tmp_path / "remat.json")
    again = auto.choose(lower, needs()["unsloth"], cache=tmp_path / "remat.json")
    assert (again.policy, again.describe()) == (first.policy, first.describe()) and count == ["dots", "attention", "unsloth"]
    assert auto.choose(lower, needs()[True], cache=tmp_path / "remat.json").policy is True


@pytest.fixture
def on_host(compiled, monkeypatch):
    """Has "unsloth" need 9 GiB of the host, and sets how many the host has; ``lowered``."""
    lower, count = compiled
    analysis, sizes = auto._analysis, ("argument", "output", "alias", "temp")

    def of_host(program):
        found = analysis(program)
        host_bytes = 9 << 30 if count[-1:] == ["unsloth"] else 0
        return types.SimpleNamespace(
            **{f"{size}_size_in_bytes": getattr(found, f"{size}_size_in_bytes") for size in sizes}, host_temp_size_in_bytes=host_bytes
        )

    def set_to(memory_gib):
        monkeypatch.setattr(host, "memory_bytes", lambda: memory_gib << 30)
        return lower

    monkeypatch.setattr(auto, "_analysis", of_host)
    return set_to


@pytest.mark.parametrize(("memory_gib", "policy"), [(22, "unsloth"), (21, True)], ids=["16 of 22 GiB pinned", "16 of 21 would be"])
def test_what_the_host_cannot_pin_is_not_taken(on_host, tmp_path, memory_gib, policy):
    choice = auto.choose(on_host(memory_gib), needs()["unsloth"], cache=tmp_path / "remat.json")
    assert choice.policy == policy
    assert ("GiB and 9.0 of the host, which it cannot pin\n" in choice.describe()) == (policy is True)


def test_another_host_chooses_again(on_host, tmp_path):
    chosen = [auto.choose(on_host(gib), needs()["unsloth"], cache=tmp_path / "remat.json").policy for gib in (16, 64, 16)]
    assert chosen == [True, "unsloth", True]


def test_a_broken_cache_is_only_a_warning(compiled, tmp_path, caplog):
    (tmp_path / "remat.json").write_text("{")
    assert auto.choose(compiled[0], 1.0, cache=tmp_path / "remat.json").policy == "dots"
    assert "not readable" in caplog.text


def test_where_none_fits_the_error_is_the_table(compiled):
    table = r"0\.0 GiB: 'dots' needs .*; 'attention' needs .*; 'unsloth' needs .*; True needs .*lower per_device_train"
    with pytest.raises(ValueError, match=table):
        auto.choose(compiled[0], 1e-6)


@pytest.mark.parametrize("policy", auto.CANDIDATES)
def test_every_candidate_is_a_policy(policy):
    assert execution(policy).scan.checkpoint
