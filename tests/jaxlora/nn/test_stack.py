"""Stacking changes neither values nor order; flatten and unflatten are inverse."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from jaxlora.nn.linear import Linear
from jaxlora.nn.scan import Scan
from jaxlora.nn.stack import Stack, flatten, layers_alike, layout, linear_paths, nest, unflatten
from jaxlora.select import expand, layers_of
from jaxlora.weights.dense import Dense
from jaxlora.weights.lora import LoRA
from tests.tolerances import REORDERED_FP32

WIDTH = 4


def filled(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


class Block(nnx.Module):
    """x + tanh(W x + shared) + per_layer; ``kind`` makes structures differ."""

    def __init__(self, layer, kind):
        self.kind = kind
        self.proj = Linear(WIDTH, WIDTH, dtype=jnp.float32)
        self.proj.weight.set_value(Dense(proj(layer)))

    def __call__(self, x, shared, per_layer):
        grown = x + jnp.tanh(self.proj(x) + shared)
        return (grown if per_layer is None else grown + per_layer), grown.sum()


def stack(kinds):
    return Stack([Block(layer, kind) for layer, kind in enumerate(kinds)], path="model.layers")


def proj(layer):
    """A layer's weight."""
    return filled(layer, WIDTH, WIDTH) / WIDTH


def unrolled(kinds, x, shared, extra=None, weights=None):
    """(the input of every layer and the last output, the layers' own outputs)."""
    states, outs = [x], []
    for layer, kind in enumerate(kinds):
        block = Block(layer, kind)
        if weights is not None:
            block.proj.weight.set_value(Dense(weights[layer]))
        x, out = block(x, shared, None if extra is None else extra[layer])
        states.append(x)
        outs.append(out)
    return states, outs


kinds_of_layers = st.lists(st.sampled_from("ab"), min_size=1, max_size=14)


class TestLayout:
    @given(kinds_of_layers)
    def test_covers_every_layer_once_in_order(self, kinds):
        runs = layout(kinds)
        assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])]
        assert runs[-1].stop == len(kinds)

    @given(kinds_of_layers)
    def test_layers_that_are_stacked_have_one_structure(self, kinds):
        for run in layout(kinds):
            for key in run.keys:
                assert len({kinds[i] for i in layers_of(key)}) == 1

    @given(kinds_of_layers)
    def test_the_keys_of_a_run_name_each_of_its_layers_once(self, kinds):
        for run in layout(kinds):
            named = [i for key in run.keys for i in layers_of(key)]
            assert sorted(named) == list(range(run.start, run.stop))

    @given(st.lists(st.sampled_from("ab"), min_size=1, max_size=4), st.integers(2, 4))
    def test_a_repeated_pattern_is_one_run_of_its_shortest_period(self, pattern, repeats):
        n = len(pattern) * repeats
        kinds = pattern * repeats
        shortest = next(p for p in range(1, n + 1) if n % p == 0 and kinds == kinds[:p] * (n // p))
        (run,) = layout(kinds)
        assert (run.start, len(run.kinds), run.repeats) == (0, shortest, n // shortest)


def loss_of(y, collected, outs):
    """A loss of all that a stack returns."""
    return y.sum() + sum(jnp.sum(jnp.sin(c)) for c in collected) + (0 if outs is None else jnp.sum(jnp.cos(jnp.stack(outs))))


def gradient(kinds, given, scan, *, wrt, collect, outs_too=True):
    """The loss's gradients by some of (the stack's state, x, shared, per_layer); ``outs_too`` are part of the loss where there are any."""
    graphdef, state = nnx.split(stack(kinds))

    def loss(state, *given):
        y, collected, outs = nnx.merge(graphdef, state)(*given, collect=collect, scan=scan)
        return loss_of(y, collected, list(outs) if outs_too and outs is not None else None)

    return jax.jit(jax.grad(loss, argnums=wrt))(state, *given)


SCANS = {
    "kept": Scan(),
    "recomputed": Scan(checkpoint=True),
    "columns kept": Scan(checkpoint=True, columns=True),
    "products kept": Scan(checkpoint=True, remat=jax.checkpoint_policies.save_only_these_names("dot")),
    "offloaded": Scan(checkpoint=True, offload=True),
    "one loop of two periods": Scan(checkpoint=True, unroll=2),
    "no loop": Scan(checkpoint=True, unroll=99),
    "products kept, no loop": Scan(checkpoint=True, remat=jax.checkpoint_policies.save_only_these_names("dot"), unroll=99),
    "products kept, a loop where kinds take turns": Scan(
        checkpoint=True, remat=jax.checkpoint_policies.save_only_these_names("dot"), unroll=None
    ),
}


def barriers(jaxpr):
    """The shapes that each barrier of a program holds back, in whatever is nested in it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "optimization_barrier":
            yield [v.aval.shape for v in eqn.invars]
        for inner in jaxprs_in_params(eqn.params):
            yield from barriers(inner)


@pytest.mark.parametrize(
    "name", ["kept", "recomputed", "products kept", "one loop of two periods", "products kept, a loop where kinds take turns"]
)
def test_no_barrier_of_a_loop_holds_back_a_layers_number_alone(name):
    # XLA for GPUs tries to work out numbers in loops beforehand, and gives up on the program at such a barrier.
    kinds = "abab"
    x, shared = filled(90, 3, WIDTH), filled(91, 1, WIDTH)
    grads = jax.make_jaxpr(lambda x: gradient(kinds, (x, shared), SCANS[name], wrt=(1,), collect=()))(x)
    found = list(barriers(grads.jaxpr))
    assert found and all(any(shapes) for shapes in found)


@pytest.mark.parametrize("kinds", ["aaaa", "abab", "aabaab", "abba"])
class TestScanned:
    def test_equals_the_layers_one_after_the_other(self, kinds):
        x, shared = filled(90, 3, WIDTH), filled(91, 1, WIDTH)
        ours, _, _ = stack(kinds)(x, shared)
        np.testing.assert_allclose(ours, unrolled(kinds, x, shared)[0][-1], atol=REORDERED_FP32)

    def test_gives_layers_their_own_slice_and_returns_their_outputs_in_layer_order(self, kinds):
        x, shared, extra = filled(90, 3, WIDTH), filled(91, 1, WIDTH), filled(92, len(kinds), 3, WIDTH)
        ours, _, outs = stack(kinds)(x, shared, extra)
        states, expected = unrolled(kinds, x, shared, extra)
        np.testing.assert_allclose(ours, states[-1], atol=REORDERED_FP32)
        np.testing.assert_allclose(outs, jnp.stack(expected), atol=10 * REORDERED_FP32)

    def test_collects_the_inputs_of_layers_and_the_output(self, kinds):
        x, shared = filled(90, 3, WIDTH), filled(91, 1, WIDTH)
        wanted = [len(kinds), 2, 0, 3]
        _, collected, _ = stack(kinds)(x, shared, collect=wanted)
        states, _ = unrolled(kinds, x, shared)
        for layer, state in zip(wanted, collected, strict=True):
            np.testing.assert_allclose(state, states[layer], atol=REORDERED_FP32)

    @pytest.mark.parametrize("scan", SCANS.values(), ids=SCANS)
    def test_how_layers_are_scanned_changes_no_gradient(self, kinds, scan):
        x, shared, extra = filled(90, 3, WIDTH), filled(91, 1, WIDTH), filled(92, len(kinds), 3, WIDTH)
        collect = (2, 0, len(kinds))

        def plain(layers, x, shared, extra):
            states, outs = unrolled(kinds, x, shared, extra, layers)
            return loss_of(states[-1], [states[i] for i in collect], None if scan.offload else outs)

        expected = jax.grad(plain, argnums=(0, 1, 2, 3))([proj(layer) for layer in range(len(kinds))], x, shared, extra)
        state, *ours = gradient(kinds, (x, shared, extra), scan, wrt=(0, 1, 2, 3), collect=collect)
        weights = {path: leaf.array for path, leaf in flatten(nnx.to_pure_dict(state)).items()}
        for layer, theirs in enumerate(expected[0]):
            np.testing.assert_allclose(weights[f"{layer}.proj.weight"], theirs, atol=20 * REORDERED_FP32)
        for mine, theirs in zip(ours, expected[1:], strict=True):
            np.testing.assert_allclose(mine, theirs, atol=20 * REORDERED_FP32)

    def test_an_offloaded_stack_is_the_same_forwards(self, kinds):
        x, shared = filled(90, 3, WIDTH), filled(91, 1, WIDTH)
        plain, states, _ = stack(kinds)(x, shared, collect=(0, 2))
        ours, offloaded, _ = stack(kinds)(x, shared, collect=(0, 2), scan=Scan(checkpoint=True, offload=True))
        np.testing.assert_array_equal(jnp.stack([ours, *offloaded]), jnp.stack([plain, *states]))


@pytest.mark.parametrize(("wrt", "collect"), [((0,), ()), ((2,), (1,))], ids=["state", "shared"])
def test_an_offloaded_stack_has_the_gradient_that_is_asked_for_and_no_other(wrt, collect):
    given = (filled(90, 3, WIDTH), filled(91, 1, WIDTH), None)
    offloaded = gradient("abab", given, Scan(checkpoint=True, offload=True), wrt=wrt, collect=collect)
    plain = gradient("abab", given, Scan(), wrt=wrt, collect=collect, outs_too=False)
    for ours, theirs in zip(jax.tree.leaves(offloaded), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=20 * REORDERED_FP32)


@pytest.mark.parametrize("more", [{"checkpoint": False}, {"remat": jax.checkpoint_policies.nothing_saveable}, {"unroll": 2}])
def test_offloading_takes_no_option_that_it_would_not_follow(more):
    with pytest.raises(ValueError, match="it needs checkpoint and nothing else"):
        Scan(**{"checkpoint": True, "offload": True, **more})


def test_paths_are_those_of_the_layers_in_order():
    assert linear_paths(stack("ab" * 6)) == sorted((f"{i}.proj" for i in range(12)), key=lambda p: int(p.split(".")[0]))


def attach_to(layers):
    def edit(layer, block):
        if layer in layers:
            like = jax.ShapeDtypeStruct
            block.proj.attach(LoRA(like((1, WIDTH), jnp.float32), like((WIDTH, 1), jnp.float32), like((), jnp.float32)))

    return edit


@pytest.mark.parametrize("layers", [set(), {0}, {1, 3}, {0, 1, 2, 3}])
def test_regrouping_moves_every_value_exactly(layers):
    before = flatten(nnx.to_pure_dict(nnx.state(stack("aaaa"))))
    after = flatten(nnx.to_pure_dict(nnx.state(stack("aaaa").regroup(attach_to(layers)))))
    assert {path for path in after if path.endswith("lora_A")} == {f"{i}.proj.lora_A" for i in layers}
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path].array, leaf.array)


def test_regrouping_splits_only_where_structures_differ():
    assert [run.keys for run in stack("aaaa").regroup(attach_to({1, 3})).runs] == [("0:4:2", "1:4:2")]


@pytest.mark.parametrize(("kinds", "alike"), [("aaaa", True), ("aabb", True), ("abab", False), ("aab", False)])
def test_layers_are_alike_where_no_run_has_two_kinds_or_one_layer(kinds, alike):
    assert layers_alike(stack(kinds)) == alike


def tree():
    return {"model": {"layers": {"0:3:1": {"w": jnp.arange(6.0).reshape(3, 2)}}, "norm": {"weight": jnp.ones(2)}}}


class TestFlatten:
    def test_gives_one_leaf_a_layer(self):
        flat = flatten(tree())
        assert list(flat) == ["model.layers.0.w", "model.layers.1.w", "model.layers.2.w", "model.norm.weight"]
        np.testing.assert_array_equal(flat["model.layers.1.w"], [2, 3])

    def test_unflatten_is_its_inverse(self):
        jax.tree.map(np.testing.assert_array_equal, unflatten(flatten(tree()), tree()), tree())

    def test_unflatten_into_other_runs_keeps_layers(self):
        like = {
            "model": {"layers": {"0:2:1": {"w": jnp.zeros((2, 2))}, "2:3:1": {"w": jnp.zeros((1, 2))}}, "norm": {"weight": jnp.ones(2)}}
        }
        other = unflatten(flatten(tree()), like)
        np.testing.assert_array_equal(other["model"]["layers"]["2:3:1"]["w"], [[4, 5]])

    def test_unflatten_lists_all_faults_at_once(self):
        flat = flatten(tree())
        del flat["model.layers.1.w"]
        flat["model.norm.weight"] = jnp.ones(3)
        flat["model.extra"] = jnp.ones(1)
        with pytest.raises(
            ValueError, match=r"(?s)layers\.1\.w: missing.*norm\.weight: shape \(3,\), expected \(2,\).*extra: belongs nowhere"
        ):
            unflatten(flat, tree())

    @given(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=4, unique=True))
    @settings(max_examples=20)
    def test_nest_makes_the_keys_of_paths(self, names):
        assert nest({f"x.{name}": i for i, name in enumerate(names)}) == {"x": {name: i for i, name in enumerate(names)}}


def test_more_than_eight_runs_warn_and_name_where_they_begin(caplog):
    # No two layers alike: every layer is a run.
    with caplog.at_level(logging.WARNING):
        stack([str(i) for i in range(9)])
    assert "model.layers splits into 9 runs" in caplog.text
    assert "[0, 1, 2, 3, 4, 5, 6, 7, 8]" in caplog.text


def test_eight_runs_do_not_warn(caplog):
    stack([str(i) for i in range(8)])
    assert not caplog.text


def test_expand_and_the_keys_of_runs_agree():
    (run,) = layout("ababab")
    assert [expand(f"layers.{key}.w") for key in run.keys] == [[f"layers.{i}.w" for i in (0, 2, 4)], [f"layers.{i}.w" for i in (1, 3, 5)]]
    (run,) = layout("aabaab")
    assert [expand(f"layers.{key}.w") for key in run.keys] == [[f"layers.{i}.w" for i in (0, 1, 3, 4)], [f"layers.{i}.w" for i in (2, 5)]]


def test_only_wanted_states_are_held_and_they_are_the_inputs_of_their_layers():
    kinds, x, shared = "aabaabaab", filled(1, 3, WIDTH), filled(2, 3, WIDTH)
    states, _ = unrolled(kinds, x, shared)
    wanted = (5, 0, 3, 9)
    _, collected, _ = stack(kinds)(x, shared, collect=wanted)
    for layer, state in zip(wanted, collected, strict=True):
        np.testing.assert_allclose(state, states[layer], atol=REORDERED_FP32)


def test_layers_may_get_and_return_things_of_their_own_kind():
    kinds, x, shared = "aabaab", filled(1, 3, WIDTH), filled(2, 3, WIDTH)
    built = stack(kinds)
    assert built.keys == ["0,1:6:3", "2:6:3"]
    extra = [filled(layer, 3, WIDTH) for layer in range(6)]
    given = {key: None if key == "2:6:3" else jnp.stack([extra[i] for i in layers_of(key)]) for key in built.keys}
    states, outs = unrolled(kinds, x, shared, [None if kinds[i] == "b" else extra[i] for i in range(6)])
    y, _, returned = built(x, shared, given)
    np.testing.assert_allclose(y, states[-1], atol=REORDERED_FP32)
    for key, out in returned.items():
        np.testing.assert_allclose(out, [outs[i] for i in layers_of(key)], atol=REORDERED_FP32)


def test_layers_of_one_structure_in_a_period_are_traced_once(monkeypatch):
    traced, real = [], Block.__call__
    built = stack("aaabaaab")
    monkeypatch.setattr(Block, "__call__", lambda block, *arguments: traced.append(block.kind) or real(block, *arguments))
    jax.make_jaxpr(built)(filled(1, 3, WIDTH), filled(2, 3, WIDTH))
    assert traced == ["a", "b"]
