import jax.numpy as jnp
import numpy as np
import pytest

from conversion import hf_config
from conversion.hf_config import Rope
from jaxlora.nn import rope
from tests.jaxlora import reference

LLAMA3 = Rope(theta=5e5, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
# transformers' inverse frequencies of Llama 3.1 (128 channels), by index.
LLAMA3_VECTOR = {28: 0.00321144611, 29: 0.00216657063, 30: 0.00137189368, 34: 1.78507791e-4, 35: 9.55621217e-5, 63: 3.06892588e-7}


@pytest.mark.parametrize(("j", "expected"), LLAMA3_VECTOR.items())
def test_llama3_frequencies_are_transformers(j, expected):
    assert rope.frequencies(128, LLAMA3)[j] == pytest.approx(expected, rel=4e-7)


def test_default_frequencies_are_powers_of_theta():
    expected = [1e4 ** (-2 * j / 20) for j in range(10)]
    np.testing.assert_allclose(rope.frequencies(20, Rope(theta=1e4)), expected, rtol=4e-7)


def test_linear_scaling_divides_frequencies_by_the_factor():
    plain, scaled = rope.frequencies(20, Rope(theta=1e4)), rope.frequencies(20, Rope(theta=1e4, kind="linear", factor=4.0))
    np.testing.assert_allclose(scaled, plain / 4, rtol=1e-7)


@pytest.mark.parametrize("case", reference.ROPE_CASES)
def test_every_scaling_is_that_of_transformers_at_every_length(case):
    scaling = hf_config.rope(reference.rope_config(case), theta=-1.0)
    for length, (expected, factor) in zip(reference.ROPE_CASES[case][1], reference.rope_expected()[case], strict=True):
        # Of all kinds but this one no frequency depends on the length: their tables are read where no sine is 0.
        tokens = length if scaling.kind == "dynamic" else length + 10
        cos, sin = rope.text_table(jnp.arange(tokens)[None], 24, scaling, jnp.float32)
        angles = (tokens - 1) * np.array(expected, np.float64)
        np.testing.assert_allclose(cos[0, -1], factor * np.cos([*angles, *angles]), atol=2e-7 * tokens)
        np.testing.assert_allclose(sin[0, -1], factor * np.sin([*angles, *angles]), atol=2e-7 * tokens)
        assert rope.attention_factor(scaling) == pytest.approx(factor, rel=1e-7)
        if scaling.kind == "dynamic":
            ours = rope.dynamic_frequencies(24, scaling, jnp.array([[length]]))[0, 0]
        else:
            ours = rope.frequencies(24, scaling)
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_dynamic_positions_of_a_document_do_not_depend_on_its_neighbours():
    scaling = Rope(theta=1e4, kind="dynamic", factor=2.0, original_max_positions=8)
    alone = rope.text_table(jnp.arange(5)[None], 12, scaling, jnp.float32)
    packed = rope.text_table(jnp.concatenate([jnp.arange(30), jnp.arange(5), jnp.zeros(3, int)])[None], 12, scaling, jnp.float32)
    np.testing.assert_array_equal(packed[0][:, 30:35], alone[0])
    assert not np.array_equal(packed[0][:, :5], alone[0])


@pytest.mark.parametrize(
    "scaling",
    [Rope(theta=1e4, kind="longrope"), Rope(theta=1e4, partial_rotary_factor=0.5), Rope(theta=1e4, mrope_interleaved=True)],
)
def test_other_scalings_are_refused(scaling):
    with pytest.raises(NotImplementedError, match="is not modelled"):
        rope.frequencies(20, scaling)


def test_yarn_of_three_dimensional_positions_is_refused():
    scaling = Rope(theta=1e4, kind="yarn", factor=2.0, original_max_positions=8, mrope_section=(2, 1, 3))
    with pytest.raises(NotImplementedError, match="'yarn' scaling of M-RoPE"):
        rope.text_table(jnp.zeros((3, 1, 4), int), 12, scaling, jnp.float32)


def test_rotation_turns_channel_pairs_by_position_times_frequency():
    x, inverse = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32), rope.frequencies(8, Rope(theta=100.0))
    positions = np.array([[0, 5, 11]])
    turned = np.asarray(rope.rotate(jnp.asarray(x), rope.table(jnp.asarray(positions), inverse, jnp.float32)))
    pairs = x[..., :4] + 1j * x[..., 4:]
    expected = pairs * np.exp(1j * positions[:, :, None, None] * inverse)
    np.testing.assert_allclose(turned, np.concatenate([expected.real, expected.imag], -1), atol=1e-5)


def test_mrope_sections_follow_time_then_height_then_width():
    inverse, sections = rope.frequencies(12, Rope(theta=100.0)), (2, 1, 3)
    positions = np.array([[[3]], [[5]], [[7]]])
    cos, _ = rope.mrope_table(jnp.asarray(positions), inverse, sections, jnp.float32)
    expected = np.cos(np.array([3, 3, 5, 7, 7, 7]) * inverse)
    np.testing.assert_allclose(cos[0, 0], np.concatenate([expected, expected]), atol=1e-5)


def test_mrope_of_equal_positions_is_the_plain_table():
    inverse, positions = rope.frequencies(12, Rope(theta=100.0)), jnp.arange(5)[None]
    three = rope.mrope_table(jnp.broadcast_to(positions[None], (3, 1, 5)), inverse, (2, 1, 3), jnp.float32)
    np.testing.assert_array_equal(three, rope.table(positions, inverse, jnp.float32))


def test_a_longer_context_scales_positions_linearly_by_the_ratio():
    longer = rope.lengthened(Rope(theta=1e4), 2048, 8192)
    assert (longer.kind, longer.factor) == ("linear", 4.0)
    assert rope.lengthened(Rope(theta=1e4, kind="linear", factor=2.0), 2048, 8192).factor == 8.0


def test_a_longer_context_stretches_yarn_further():
    yarn = Rope(theta=1e4, kind="yarn", factor=4.0, original_max_positions=2048)
    assert rope.lengthened(yarn, 8192, 16384) == Rope(theta=1e4, kind="yarn", factor=8.0, original_max_positions=2048)


def test_llama3_and_dynamic_scaling_and_a_shorter_context_are_kept():
    dynamic = Rope(theta=1e4, kind="dynamic", factor=2.0, original_max_positions=8192)
    assert rope.lengthened(LLAMA3, 8192, 10**6) is LLAMA3 and rope.lengthened(dynamic, 8192, 10**6) is dynamic
    assert rope.lengthened(Rope(theta=1e4), 2048, 2048) == Rope(theta=1e4)


def test_mrope_cannot_be_lengthened():
    with pytest.raises(NotImplementedError, match="max_seq_length=8192 is more than the model's 2048"):
        rope.lengthened(Rope(theta=1e4, mrope_section=(2, 1, 3)), 2048, 8192)
