import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention
from pallas_kernels.attention import Alike, Intervals, cover, cudnn, front, xla
from pallas_kernels.attention.reference import reference
from tests.pallas_kernels import h200
from tests.pallas_kernels.rows import qkv, segments


def test_positions_in_no_segment_are_exactly_zero():
    q, k, v = qkv(12)
    out = attention(q, k, v, segments=segments((2, 3), (6, 4)), causal=True, backend="xla")
    outside = jnp.array([0, 1, 5, 10, 11])
    assert not jnp.any(out[:, outside]) and jnp.all(jnp.any(out[0, 2:5] != 0, axis=-1))


def test_positions_in_no_segment_take_no_gradient():
    inside = segments((2, 3), (6, 4))
    grads = jax.grad(lambda qkv: attention(*qkv, segments=inside, causal=True, backend="xla").sum())(qkv(12))
    outside = jnp.array([0, 1, 5, 10, 11])
    assert not any(jnp.any(g[:, outside]) for g in grads)


def test_a_segment_does_not_see_another():
    q, k, v = qkv(12)
    two = segments((0, 5), (5, 7))
    changed = attention(q, k.at[:, :5].add(1.0), v.at[:, :5].add(1.0), segments=two, causal=False, backend="xla")
    assert jnp.array_equal(changed[:, 5:], attention(q, k, v, segments=two, causal=False, backend="xla")[:, 5:])


def test_a_window_as_long_as_the_row_is_no_window():
    q, k, v = qkv(8, dtype=jnp.bfloat16)
    with h200.pretended():
        assert cudnn.refuses(front._spec(q, causal=True, window=8), q, k, None, None) is None


def seen_by(length, **options):
    """Which keys each query sees, [S, S]: where the gradient of its output reaches values."""
    q, k, v = qkv(length, heads=1, kv_heads=1, width=1)
    jacobian = jax.jacobian(lambda v: attention(q, k, v, causal=True, backend="xla", **options)[0, :, 0, 0])(v)
    return np.asarray(jacobian[:, 0, :, 0, 0] > 0)


def test_tokens_of_an_image_see_each_other_and_what_is_before_within_document_and_window():
    # Two documents of 9 and 5 tokens; the first has an image at 3 to 7, the second one that begins it.
    reach = np.array([[0, 0, 0, 8, 8, 8, 8, 8, 0, 11, 11, 0, 0, 0]])
    i, j = np.mgrid[:14, :14]
    document, image = np.where(i < 9, 0, 1) == np.where(j < 9, 0, 1), (reach.T > 0) & (reach.T == reach)
    expected = document & ((j <= i) | image)
    inside = segments((0, 9), (9, 5))
    assert np.array_equal(seen_by(14, segments=inside, reach=jnp.asarray(reach)), expected)
    assert np.array_equal(seen_by(14, segments=inside, reach=jnp.asarray(reach), window=3), expected & (j > i - 3))


def test_looking_ahead_ends_with_the_document():
    assert not seen_by(8, segments=segments((0, 4), (4, 4)), reach=jnp.full((1, 8), 8))[:4, 4:].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": True}, "intervals are all that a query sees: causal, window and longest must be off, got True, None and None"),
        ({"causal": False, "window": 3, "longest": 4}, "must be off, got False, 3 and 4"),
        ({"causal": False, "short": 1}, r"intervals must be two arrays \[B, S\] = \(1, 8\), got \(1, 7\)"),
    ],
)
def test_intervals_are_whole_and_alone(options, message):
    length = 8 - options.pop("short", 0)
    seen = Intervals(*jnp.zeros((2, 1, length), jnp.int32))
    with pytest.raises(ValueError, match=message):
        attention(*qkv(8), segments=seen, **options)


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (3, {}, r"segments alike are equal parts of rows of queries and of keys, got 3 of q \(1, 8, "),
        (0, {}, "equal parts of rows of queries and of keys, got 0"),
        (2, {"reach": jnp.zeros((1, 8), jnp.int32)}, "of segments alike it must be None"),
    ],
)
def test_segments_alike_are_equal_parts(count, options, message):
    with pytest.raises(ValueError, match=message):
        attention(*qkv(8), segments=Alike(count), causal=True, **options)


def test_looking_ahead_without_causality_is_a_mistake():
    with pytest.raises(ValueError, match="reach lifts causality for single tokens: it needs causal=True"):
        attention(*qkv(8), segments=segments((0, 8)), causal=False, reach=jnp.zeros((1, 8), jnp.int32))


@pytest.mark.parametrize("direction", ["forward", "gradient"])
def test_a_row_of_16384_needs_memory_for_blocks_and_no_square(direction):
    length, heads, width = 16_384, 2, 16
    q, kv = (jax.ShapeDtypeStruct((1, length, n, width), jnp.float32) for n in (heads, 1))
    ints = jax.ShapeDtypeStruct((1, 4), jnp.int32)

    def forward(q, k, v, starts, lengths):
        return attention(q, k, v, segments=(starts, lengths), causal=True, backend="xla")

    f = forward if direction == "forward" else jax.grad(lambda *args: forward(*args).sum(), argnums=(0, 1, 2))
    temp = jax.jit(f).lower(q, kv, kv, ints, ints).compile().memory_analysis().temp_size_in_bytes
    # Heads-first copies of q, k, v, out, dout, and the sums dq, dk, dv: at most 10 of q's size. A tile's logits, p, dp and ds: 4.
    bound = 4 * (10 * length * heads * width + 4 * heads * 512 * 512)
    assert temp < bound < 4 * length * length / 10


def visited_tiles(monkeypatch, length, **options):
    tiles = []
    original = xla._logits
    monkeypatch.setattr(xla, "_logits", lambda *args: tiles.append(1) or original(*args))
    monkeypatch.setattr(xla, "LARGEST_BLOCK", 16)
    q, k, v = qkv(length)
    # Without jit a loop calls its body once a trip.
    with jax.disable_jit():
        attention(q, k, v, backend="xla", **options)
    return len(tiles)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"segments": segments((0, 96)), "causal": False}, 6 * 6),
        ({"segments": segments((0, 96)), "causal": True}, 6 * 7 // 2),
        ({"segments": segments((0, 48), (48, 48)), "causal": False}, 2 * 3 * 3),
        ({"segments": segments((0, 32), (32, 32), (64, 32)), "causal": True}, 3 * 3),
        ({"segments": segments((0, 96)), "causal": True, "window": 16}, 1 + 5 * 2),
        ({"segments": segments((32, 16)), "causal": False}, 1),
    ],
)
def test_only_blocks_that_a_segment_joins_are_visited(monkeypatch, options, expected):
    assert visited_tiles(monkeypatch, 96, **options) == expected


def layers(backend, names, length):
    """The gradient of three scanned and rematerialised layers of attention, which saves ``names``."""
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    inside = segments((0, 5), (5, length - 5))

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)
    def body(x, w):
        x = jnp.sin(x * w)
        return attention(x, x, x, segments=inside, causal=True, backend=backend), None

    return jax.grad(lambda x, w: jax.lax.scan(body, x, w)[0].astype(jnp.float32).sum(), argnums=(0, 1))


@pytest.mark.parametrize("names, expected", [(("attn_out", "attn_lse"), 1), ((), 2)])
def test_saving_both_names_keeps_the_forward_attention_from_running_twice(names, expected):
    text = str(jax.make_jaxpr(layers("xla", names, 600))(jnp.ones((1, 600, 2, 8)), jnp.ones(3)))
    # The printer gives a jitted function once and its calls by name.
    assert text.count("name=attention_forward") == expected


@pytest.mark.parametrize("names, expected", [(("attn_out", "attn_lse"), 1), ((), 2)])
def test_saving_both_names_keeps_cudnn_from_running_twice(names, expected):
    text = h200.lowered_text(layers("cudnn", names, 64), jnp.ones((1, 64, 2, 8), jnp.bfloat16), jnp.ones(3, jnp.bfloat16))
    assert text.count("@__cudnn$fmhaSoftmax(") == expected and text.count("@__cudnn$fmhaSoftmaxBackward(") == 1


@pytest.mark.parametrize("backend", ["xla", pytest.param("cudnn", marks=pytest.mark.gpu)])
def test_covered_padding_changes_no_token_and_takes_no_gradient(backend):
    arrays = qkv(64, dtype=jnp.bfloat16)
    given = segments((0, 20), (20, 25))

    def tokens_only(segments, arrays):
        out = attention(*arrays, segments=segments, causal=True, backend=backend)
        return jnp.sum(out[:, :45].astype(jnp.float32) ** 2), out

    (_, out), grads = jax.value_and_grad(functools.partial(tokens_only, given), has_aux=True)(arrays)
    (_, covered), covered_grads = jax.value_and_grad(functools.partial(tokens_only, cover(given, 64)), has_aux=True)(arrays)
    np.testing.assert_array_equal(out[:, :45], covered[:, :45])
    assert bool(jnp.isfinite(covered).all()) and bool(jnp.any(covered[:, 45:] != 0, axis=(2, 3)).all())
    for a, b in zip(grads, covered_grads, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", ["xla", pytest.param("cudnn", marks=pytest.mark.gpu)])
def test_the_tokens_of_one_document_are_those_of_the_reference_whatever_its_padding_sees(backend):
    arrays = qkv(64, dtype=jnp.bfloat16)

    def tokens(call, segments, arrays):
        out = call(*arrays, segments=segments, causal=True)[:, :45].astype(jnp.float32)
        return jnp.sum(jnp.square(out)), out

    def results(call, segments):
        (_, out), grads = jax.value_and_grad(functools.partial(tokens, call, segments), has_aux=True)(arrays)
        return [out, *grads]

    alone = segments((0, 45))
    expected, found = results(reference, alone), results(functools.partial(attention, backend=backend), cover(alone, 64))
    for ours, exact in zip(found, expected, strict=True):
        assert bool(jnp.isfinite(ours).all())
        ours, exact = (np.asarray(x, np.float64) for x in (ours, exact))
        assert np.linalg.norm(ours - exact) <= front.KERNEL.tolerance["bfloat16"] * np.linalg.norm(exact)


def test_an_unknown_backend_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no backend 'flash'; known are 'auto', 'cudnn', 'xla', 'short'"):
        attention(*qkv(16), segments=segments((0, 16)), causal=True, backend="flash")


def test_a_fallback_is_logged_once_with_its_reason(caplog):
    h200._kernel._log_fallback.cache_clear()
    with caplog.at_level("INFO", logger="pallas_kernels"):
        for _ in range(2):
            attention(*qkv(16), segments=segments((0, 16)), causal=True)
    assert caplog.messages == ["attention runs on 'xla'; cudnn: needs bfloat16 or float16, got float32"]


def test_mismatched_arguments_are_named_together():
    q, k, v = qkv(16, heads=3, kv_heads=2)
    with pytest.raises(ValueError, match="3 query heads are no multiple of 2 key heads.*must share a dtype"):
        attention(q, k.astype(jnp.bfloat16), v, segments=segments((0, 16)), causal=True)


def test_sinks_take_weight_from_the_values():
    q, k, v = qkv(8)
    one = segments((0, 8))
    without = attention(q, k, v, segments=one, causal=True, backend="xla")
    # Token 0 sees one key: its weight is the sigmoid of its logit minus the sink.
    logit = jnp.einsum("hc,c->h", q[0, 0], k[0, 0, 0]) * 8**-0.5
    expected = without[0, 0] * jax.nn.sigmoid(logit - 0.7)[:, None]
    found = attention(q, k, v, segments=one, causal=True, sinks=jnp.full(2, 0.7), backend="xla")[0, 0]
    assert jnp.allclose(found, expected, atol=1e-6)


def test_the_reference_is_softmax_over_the_visible_keys():
    q, k, v = qkv(6, heads=1)
    out = reference(q, k, v, segments=segments((1, 4)), causal=True, scale=1.0)
    weights = np.exp(np.asarray(k[0, 1:4, 0]) @ np.asarray(q[0, 3, 0]))
    assert np.allclose(out[0, 3, 0], weights @ np.asarray(v[0, 1:4, 0]) / weights.sum(), atol=1e-6)
