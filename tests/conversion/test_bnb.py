"""bitsandbytes' 4-bit and int8 weights against tensors that bitsandbytes wrote (tests/oracle/make_bnb_golden.py)."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from conversion.formats import bnb

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "bnb"
LABELS = ("bf16", "f16", "f32")
VARIANTS = ("nf4", "nf4.double", "fp4", "fp4.double")


def golden(label):
    return load_file(GOLDEN / f"{label}.safetensors")


def stored(tensors, name):
    return {k: v for k, v in tensors.items() if k == name or bnb.weight_of(k) == name}


def decoded(tensors, name):
    return bnb.decode(name, tensors[name], {bnb.suffix_of(k): v for k, v in tensors.items() if bnb.weight_of(k) == name})


def bits(array):
    return array.dtype, array.shape, array.tobytes()


def values(q):
    return np.stack([q.codes & 15, q.codes >> 4], -1).reshape(-1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("label", LABELS)
def test_dequantised_weight_is_bitsandbytes_bit_for_bit(label, variant):
    tensors = golden(label)
    assert bits(bnb.dequantise(decoded(tensors, f"{variant}.weight"))) == bits(tensors[f"{variant}.dequantised"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("label", LABELS)
def test_structure_is_read_from_the_state_alone(label, variant):
    name, tensors = f"{variant}.weight", golden(label)
    suffix = bnb.state_suffix(bnb.suffix_of(k) for k in stored(tensors, name) if k != name)
    assert bnb.read_structure(name, suffix, tensors[f"{name}.{suffix}"]) == decoded(tensors, name).structure


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("label", LABELS)
def test_reading_and_writing_again_gives_every_byte_back(label, variant):
    name, tensors = f"{variant}.weight", golden(label)
    expected = {k: bits(v) for k, v in stored(tensors, name).items()}
    assert {k: bits(v) for k, v in bnb.to_tensors(name, decoded(tensors, name)).items()} == expected


@pytest.mark.parametrize("label", LABELS)
def test_quantising_without_double_quantisation_gives_bitsandbytes_bytes(label):
    tensors = golden(label)
    ours = bnb.to_tensors("nf4.weight", bnb.quantise_nf4(tensors["w"], double_quant=False))
    assert {k: bits(v) for k, v in ours.items()} == {k: bits(v) for k, v in stored(tensors, "nf4.weight").items()}


def test_double_quantisation_gives_bitsandbytes_codes_and_nested_scales_within_one_rounding():
    tensors = golden("long")
    theirs, ours = decoded(tensors, "weight"), bnb.quantise_nf4(tensors["w"])
    np.testing.assert_array_equal(ours.codes, theirs.codes)
    # torch sums the mean in another order, which moves the offset by an ulp or two and with it everything below.
    np.testing.assert_allclose(ours.nested.offset, theirs.nested.offset, rtol=3e-7)
    np.testing.assert_allclose(ours.nested.absmax, theirs.nested.absmax, rtol=1e-6)
    steps = np.abs(ours.nested.codes.astype(int) - theirs.nested.codes)
    assert steps.max() <= 1 and steps.mean() <= 0.004


def test_dynamic_map_is_the_one_that_bitsandbytes_stores():
    np.testing.assert_array_equal(bnb.dynamic_map(), golden("long")["weight.nested_quant_map"])


@pytest.mark.parametrize("label", LABELS)
def test_int8_weight_dequantises_as_bitsandbytes_does(label):
    tensors = golden(label)
    assert bits(bnb.dequantise_int8(decoded(tensors, "int8.weight"))) == bits(tensors["int8.dequantised"])


def test_even_elements_are_in_the_low_nibble():
    w = np.array([[-1, 1, 0, 1]], np.float32)
    assert bnb.quantise_nf4(w).codes.tolist() == [0xF0, 0xF7]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(3, 20), (5, 13), (1, 1), (7, 65)])
def test_blocks_cross_rows_when_the_input_is_no_multiple_of_64(shape, double_quant):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    q = bnb.quantise_nf4(w, double_quant=double_quant)
    flat = [bnb.NF4[values(q)[i]] * q.absmax[i // 64] for i in range(w.size)]
    np.testing.assert_array_equal(bnb.dequantise(q).reshape(-1), flat)
    assert bits(bnb.to_tensors("x", decoded(bnb.to_tensors("x", q), "x"))["x"]) == bits(bnb.to_tensors("x", q)["x"])


def test_each_value_becomes_its_nearest_code():
    w = np.random.default_rng(1).uniform(-1, 1, (4, 64)).astype(np.float32)
    q = bnb.quantise_nf4(w, double_quant=False)
    scaled = (w / np.abs(w).max(1, keepdims=True)).reshape(-1)
    np.testing.assert_array_equal(values(q), np.abs(scaled[:, None] - bnb.NF4).argmin(1))


def test_a_value_between_two_codes_becomes_the_lower_one():
    middles = (bnb.NF4[1:] + bnb.NF4[:-1]) / 2
    q = bnb.quantise_nf4(np.append(middles, np.float32(1))[None], double_quant=False)
    assert values(q).tolist() == [*range(15), 15]


def test_relative_error_on_normal_weights_is_that_of_nf4():
    w = np.random.default_rng(2).normal(size=(256, 512)).astype(np.float32)
    error = np.linalg.norm(bnb.dequantise(bnb.quantise_nf4(w, double_quant=False)) - w) / np.linalg.norm(w)
    assert abs(error - 0.0920) < 5e-4


def test_quantising_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="2 values that are not finite"):
        bnb.quantise_nf4(np.array([[1, np.inf, np.nan]], np.float32))


def broken(change):
    tensors = stored(golden("bf16"), "nf4.double.weight")
    change(tensors)
    return tensors


def edit_state(**changes):
    def change(tensors):
        key = next(k for k in tensors if "quant_state" in k)
        state = json.loads(tensors[key].tobytes()) | changes
        tensors[key] = np.frombuffer(json.dumps(state).encode(), np.uint8)

    return change


def cut(suffix):
    def change(tensors):
        tensors[f"nf4.double.weight{suffix}"] = tensors[f"nf4.double.weight{suffix}"][:-1]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut(""), r"weight bytes: expected 320 of uint8, got \[319\]"),
        (cut(".absmax"), r"absmax: expected 10 of uint8, got \[9\]"),
        (cut(".quant_map"), r"quant_map: expected 16 of float32, got \[15\]"),
        (cut(".nested_quant_map"), r"nested_quant_map: expected 256"),
        (edit_state(blocksize=128), r"absmax: expected 5 of uint8, got \[10\]"),
        (edit_state(nested_blocksize=4), r"nested_absmax: expected 3 of float32, got \[1\]"),
        (edit_state(shape=[11, 64]), "weight bytes: expected 352"),
        (edit_state(blocksize=0), "must be positive integers"),
        (edit_state(blocksize=True), "must be positive integers"),
        (edit_state(dtype="float8"), "dtype is 'float8'"),
        (edit_state(nested_offset="x"), "nested_offset is 'x'"),
        (lambda t: t.pop("nf4.double.weight.nested_absmax"), "lacks parts of its quantisation state:\n  - nested_absmax"),
        (lambda t: t.pop("nf4.double.weight.quant_state.bitsandbytes__nf4"), "is the checkpoint complete"),
    ],
)
def test_a_broken_state_is_a_named_error(change, message):
    with pytest.raises(ValueError, match=r"nf4\.double\.weight(.|\n)*" + message):
        decoded(broken(change), "nf4.double.weight")


@pytest.mark.parametrize("state", [b"[]", b"{", b"7", b"\xff", b"[" * 100_000, b'{"quant_type":"nf4"}'])
def test_a_state_that_is_no_complete_json_object_is_a_named_error(state):
    key = "nf4.double.weight.quant_state.bitsandbytes__nf4"
    with pytest.raises(ValueError, match="the quantisation state of nf4.double.weight"):
        decoded(broken(lambda t: t.update({key: np.frombuffer(state, np.uint8)})), "nf4.double.weight")


def test_int8_scales_of_the_wrong_size_are_a_named_error():
    with pytest.raises(ValueError, match=r"SCB \[out\], got int8 \[4, 2\] with float32 \[3\]"):
        bnb.decode("w", np.zeros((4, 2), np.int8), {"SCB": np.ones(3, np.float32)})


def test_int8_in_a_turing_layout_is_refused():
    with pytest.raises(NotImplementedError, match="layout 2"):
        bnb.decode("w", np.zeros((4, 2), np.int8), {"SCB": np.ones(4, np.float32), "weight_format": np.array(2, np.uint8)})
