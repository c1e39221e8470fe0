"""What waits in host memory beside a block's input is not computed again: adapters' columns, attention's output or all that it needs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxlora.nn import host, offload
from jaxlora.nn.mlp import by_tiles
from jaxlora.nn.scan import Run, Scan, scan_periods
from jaxlora.nn.vjp import Wanted, linearise
from jaxlora.weights.dense import Dense
from jaxlora.weights.float8 import Float8
from tests.tolerances import REORDERED_FP32

ROWS, WIDTH, PERIODS = 4, 3, 3


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def root(z, name):
    """A cube root, whose gradient needs nothing but the root itself, as attention's needs its output."""
    return jnp.cbrt(z)


def root_forward(z, name):
    y = checkpoint_name(jnp.cbrt(z), name)
    return y, y


root.defvjp(root_forward, lambda name, y, dy: (dy / (3 * y * y),))


def block(x, w):
    return x + root(x * w, "attn_out"), None


def taller(x, w):
    """Keeps something of another shape than x."""
    return x + w * root(jnp.stack([x, x + 1]), "attn_lse").sum(0), None


def plain(x, w):
    return x + jnp.sin(x * w), None


def attending(x, w):
    """Attention and an MLP, as a layer names what they make."""
    y = checkpoint_name(x + root(root(x * w, "qkv"), "attn_out"), "residual")
    return y + jnp.sin(y * w), None


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(0).uniform(1, 2, shape).astype(np.float32))


def scanned(blocks, x, weights):
    if len(blocks) == 1:
        return offload.scan_offloaded(lambda x, own: blocks[0](x, *own), x, weights[0], None, None)[0]
    run, scan = Run(start=0, kinds=tuple(range(len(blocks))), repeats=PERIODS), Scan(checkpoint=True, offload=True)
    return scan_periods(run, scan, [lambda x, own, block=block: block(x, *own) for block in blocks], x, weights, None, None)[0]


def gradient(blocks, *more):
    """(the compiled gradient by x and the blocks' weights, its arguments); ``more`` is what all blocks get beside."""
    x, weights = drawn(ROWS, WIDTH), [(drawn(PERIODS, ROWS, WIDTH) + i, *more) for i in range(len(blocks))]

    def loss(x, weights):
        return jnp.sum(jnp.sin(scanned(blocks, x, weights)))

    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, weights).compile(), (x, weights)


@pytest.mark.parametrize(("long", "roots"), [(ROWS, 1), (ROWS + 1, 2)], ids=["long rows", "short rows"])
def test_attention_is_computed_again_in_short_rows_alone(monkeypatch, long, roots):
    monkeypatch.setattr(offload, "_LONG", long)
    program, _ = gradient([block])
    assert program.as_text().count(" cbrt(") == roots


def test_columns_of_adapters_are_kept_in_rows_of_any_length():
    program, _ = gradient([lambda x, w: (x + root(x * w, "lora_u"), None)])
    assert program.as_text().count(" cbrt(") == 1


def test_beside_its_input_a_block_saves_attention_and_none_of_its_weights(monkeypatch):
    monkeypatch.setattr(offload, "_LONG", ROWS)
    x, w = drawn(ROWS, WIDTH), drawn(ROWS, WIDTH)
    sizes = []

    def saved(x, w):
        primal = jax.custom_derivatives.CustomVJPPrimal
        wanted = Wanted.of((primal(w, True),)), Wanted.of([])
        _, kept, _ = linearise(lambda x, own: taller(x, *own), x, (w,), [], wanted, offload.recomputing(x), keep=True)
        sizes.extend(a.shape for a in kept)
        return kept

    jax.eval_shape(saved, x, w)
    assert sizes == [(2, ROWS, WIDTH)]


@pytest.fixture
def room(monkeypatch):
    """Sets what the host has, in bytes, and what a byte's way is worth."""

    def set_to(memory_bytes, flop_a_byte):
        monkeypatch.setattr(host, "memory_bytes", lambda: memory_bytes)
        monkeypatch.setattr(offload, "_FLOP_A_BYTE", flop_a_byte)

    return set_to


# Of each layer: four arrays [ROWS, WIDTH] in fp32 travel, and a product of 64 x 64 has 170 FLOP for each of their bytes.
LAYER_BYTES = 4 * ROWS * WIDTH * 4
DENSE = Dense(drawn(PERIODS, 64, 64))


@pytest.mark.parametrize(
    ("weight", "memory_bytes", "flop_a_byte", "times"),
    [
        (DENSE, 4 * PERIODS * LAYER_BYTES, 170, 1),
        (DENSE, 4 * PERIODS * LAYER_BYTES, 171, 2),
        (DENSE, 4 * PERIODS * LAYER_BYTES - 1, 170, 2),
        (Float8.of(DENSE), 4 * PERIODS * LAYER_BYTES, 85, 1),
        (Float8.of(DENSE), 4 * PERIODS * LAYER_BYTES, 86, 2),
    ],
    ids=["hidden and room", "products too short", "no room", "e4m3, hidden", "e4m3 takes half the time"],
)
def test_attention_runs_once_where_its_arrays_travel_behind_products_and_have_room(room, weight, memory_bytes, flop_a_byte, times):
    room(memory_bytes, flop_a_byte)
    program, _ = gradient([lambda x, w, weight: attending(x, w)], weight)
    assert program.as_text().count(" cbrt(") == 2 * times


def assert_gradient_is_of_blocks_in_turn(blocks):
    program, (x, weights) = gradient(blocks)

    def one_after_the_other(x, weights):
        for i in range(PERIODS):
            for layer, (w,) in zip(blocks, weights, strict=True):
                x, _ = layer(x, w[i])
        return jnp.sum(jnp.sin(x))

    expected = jax.grad(one_after_the_other, argnums=(0, 1))(x, weights)
    for ours, theirs in zip(jax.tree.leaves(program(x, weights)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=20 * REORDERED_FP32, atol=20 * REORDERED_FP32)


@pytest.mark.parametrize("blocks", [[block], [block, plain], [plain, taller, block]], ids=["alike", "some keep nothing", "three shapes"])
def test_what_is_kept_changes_no_gradient(monkeypatch, blocks):
    monkeypatch.setattr(offload, "_LONG", ROWS)
    assert_gradient_is_of_blocks_in_turn(blocks)


def test_attention_that_travels_whole_changes_no_gradient(room):
    room(1 << 40, 0)
    assert_gradient_is_of_blocks_in_turn([attending])


@pytest.mark.gpu
def test_nothing_but_what_travels_is_copied_in_the_background():
    def tiled(x, w):
        return x + by_tiles(lambda part: jnp.tanh(part @ w), x, 256), None

    def loss(x, w):
        return jnp.sum(jnp.sin(scanned([tiled], x, [(w,)])))

    x, w = jax.ShapeDtypeStruct((1, 1024, 512), jnp.float32), jax.ShapeDtypeStruct((PERIODS, 512, 512), jnp.float32)
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, w).compile().as_text()
    begun = [line for line in text.splitlines() if "-start(" in line]
    # To the host, and back for the last block and for the others. XLA's number of host memory is 5.
    assert [":S(5)}" in line for line in begun] == [True] * 3, begun
