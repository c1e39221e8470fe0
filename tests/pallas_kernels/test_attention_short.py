import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import attention
from tests.pallas_kernels import h200
from tests.pallas_kernels.rows import qkv, segments


def test_segments_that_are_known_to_be_short_are_small_dense_attentions():
    text = h200.lowered_text(
        functools.partial(attention, segments=segments((0, 20), (20, 44)), causal=False, longest=44), *qkv(64, dtype=jnp.bfloat16)
    )
    assert "cudnn$" not in text and "tensor<2x1x2x44x44xf32>" in text


def test_a_segment_longer_than_promised_is_loud():
    for lengths, finite in (((44, 20), True), ((45, 19), False)):
        given = {"segments": segments((0, lengths[0]), lengths), "causal": False, "longest": 44}
        out, pull = jax.vjp(functools.partial(attention, **given), *qkv(64))
        assert bool(jnp.isfinite(out).all()) == finite == bool(jnp.isfinite(pull(out)[0]).all())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "needs to know that segments are short"),
        ({"longest": 129}, "takes segments of at most 128 tokens, got 129"),
        ({"longest": 16, "softcap": 3.0}, "has no soft-cap"),
        ({"longest": 16, "sinks": jnp.zeros(2)}, "has no sinks"),
    ],
)
def test_naming_short_where_it_cannot_run_raises_the_reason(options, reason):
    with pytest.raises(NotImplementedError, match=reason):
        attention(*qkv(16), segments=segments((0, 16)), causal=True, backend="short", **options)
