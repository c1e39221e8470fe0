import dataclasses
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

MASKED = ("window", "window_bidirectional", "images", "images_window", "intervals", "blocks_intervals", "an_empty_row")


@pytest.mark.parametrize("name", MASKED)
def test_cudnns_mask_leaves_what_the_reference_sees(name):
    case = front.KERNEL.cases[name](jnp.float32)
    q, k, v, seen = (case.arrays[n] for n in ("q", "k", "v", "segments"))
    options = {n: x for n, x in case.static.items() if n != "softcap"}
    spec, reach = front._spec(q, **options), case.arrays.get("reach")
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("bshc,bthc->bhst", q, k) * spec.scale + cudnn._mask(spec, q, k, seen, reach)
    out = cudnn._zero_outside(spec, seen, jnp.einsum("bhst,bthc->bshc", jax.nn.softmax(logits), v))
    np.testing.assert_allclose(out, reference(q, k, v, segments=seen, reach=reach, **options), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "masked"),
    [
        ({"segments": Intervals(*jnp.zeros((2, 1, 64), jnp.int32)), "causal": False}, True),
        ({"segments": segments((0, 64)), "causal": True, "reach": jnp.zeros((1, 64), jnp.int32)}, True),
        ({"segments": segments((0, 64)), "causal": True, "window": 9}, True),
        ({"segments": cover(segments((0, 45)), 64), "causal": True, "window": 9}, True),
        ({"segments": cover(segments((0, 45)), 64), "causal": True}, False),
        ({"segments": Alike(2), "causal": True}, False),
    ],
)
def test_cudnn_has_a_mask_where_segments_do_not_say_what_is_seen(options, masked):
    def loss(arrays):
        return attention(*arrays, backend="cudnn", **options).astype(jnp.float32).sum()

    text = h200.lowered_text(jax.grad(loss), qkv(64, dtype=jnp.bfloat16))
    forward, backward = (line for line in text.splitlines() if "cudnn$" in line)
    kind = "NO_MASK" if masked else "CAUSAL"
    for line in (forward, backward):
        assert ("fmhaScaleBiasSoftmax" in line) == masked
        assert f"mask_type\\22: \\22{kind}\\22" in line and "sliding_window_length\\22: 0" in line


@pytest.mark.parametrize(
    ("lengths", "memory_gb", "reason"),
    [
        ((8, 7), 80, "masks even numbers of queries and keys alone, got 8 and 7"),
        ((32768, 65536), 80, "needs a mask of 4.3 GB, more than 3% of the device's 80 GB"),
        ((32768, 65536), 140, None),
    ],
)
def test_cudnn_masks_what_fits(lengths, memory_gb, reason):
    def asked(q, k, starts, ends):
        return front._refuses("cudnn", q, k, k, segments=Intervals(starts, ends), causal=False)

    shapes = [((1, length, 2, 64), jnp.bfloat16) for length in lengths]
    with h200.pretended(memory_bytes=memory_gb * 10**9):
        assert answer(asked, *shapes, *[((1, lengths[0]), jnp.int32)] * 2) == reason


@pytest.mark.parametrize(("length", "reason"), [(6144, None), (6146, "computes all 6146 keys of each query, for a window of 1024")])
def test_cudnn_leaves_windows_in_long_rows_to_the_path_that_skips_what_is_outside(length, reason):
    def asked(q, starts, lengths):
        return front._refuses("cudnn", q, q, q, segments=(starts, lengths), causal=True, window=1024)

    with h200.pretended():
        assert answer(asked, ((1, length, 2, 64), jnp.bfloat16), *[((1, 2), jnp.int32)] * 2) == reason


def answer(ask, *shapes):
    """What ``ask`` says of arrays of these shapes, which are not made."""
    said = []
    jax.eval_shape(lambda *arrays: said.append(ask(*arrays)), *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    return said[0]


@pytest.mark.parametrize(
    ("device_gb", "backend", "reason"),
    [(140, "cudnn", None), (80, "xla", "needs 10.8 GB for 258 segments a row, more than an eighth of the device's 80 GB")],
)
def test_many_segments_are_no_packed_offsets_where_cudnns_sums_would_fill_the_device(device_gb, backend, reason):
    def asked(q, starts, lengths):
        options = {"segments": (starts, lengths), "causal": False}
        return front._refuses("cudnn", q, q, q, **options), front.KERNEL.choose("auto", q, q, q, **options)

    with h200.pretended(memory_bytes=device_gb * 10**9):
        assert answer(asked, ((1, 8192, 16, 80), jnp.bfloat16), *[((1, 258), jnp.int32)] * 2) == (reason, backend)


@pytest.mark.parametrize("causal, mask", [(True, "PADDING_CAUSAL"), (False, "PADDING\\")])
def test_auto_on_an_h200_lowers_to_packed_cudnn_forward_and_backward(causal, mask):
    inside = segments((0, 20), (20, 44))
    gradient = jax.grad(lambda qkv: attention(*qkv, segments=inside, causal=causal).astype(jnp.float32).sum())
    text = h200.lowered_text(gradient, qkv(64, heads=4, kv_heads=2, width=80, dtype=jnp.bfloat16))
    forward, backward = (line for line in text.splitlines() if "cudnn$" in line)
    assert all(f"mask_type\\22: \\22{mask}" in line and "max_seg_per_batch\\22: 2" in line for line in (forward, backward))


def test_segments_alike_are_rows_of_their_own_to_cudnn():
    gradient = jax.grad(lambda qkv: attention(*qkv, segments=Alike(4), causal=False).astype(jnp.float32).sum())
    text = h200.lowered_text(gradient, qkv(64, heads=4, kv_heads=2, width=80, dtype=jnp.bfloat16))
    forward, backward = (line for line in text.splitlines() if "cudnn$" in line)
    for line in (forward, backward):
        assert "mask_type\\22: \\22NO_MASK" in line and "max_seg_per_batch\\22: 1" in line
        assert "4x16x4x80xbf16" in line


def test_auto_on_an_h200_runs_a_soft_cap_without_cudnn():
    f = functools.partial(attention, segments=segments((0, 64)), causal=True, softcap=30.0)
    text = h200.lowered_text(f, *qkv(64, dtype=jnp.bfloat16))
    assert "cudnn$" not in text


def test_cudnn_reads_minus_one_for_unused_and_starts_without_an_end():
    lengths, offsets = cudnn.packed_segments((jnp.array([[0, 5, 0], [3, 0, 0]]), jnp.array([[5, 4, 0], [9, 0, 0]])))
    assert lengths.tolist() == [[5, 4, -1], [9, -1, -1]] and offsets.tolist() == [[0, 5, -1, -1], [3, -1, -1, -1]]


def test_cudnn_gets_a_second_column_when_rows_have_one_segment():
    lengths, offsets = cudnn.packed_segments((jnp.array([[2]]), jnp.array([[6]])))
    assert lengths.tolist() == [[6, -1]] and offsets.tolist() == [[2, -1, -1]]


def test_the_packing_check_passes_for_a_right_backend_even_inside_a_trace(monkeypatch):
    monkeypatch.setattr(cudnn, "attention_forward", xla.attention_forward)
    monkeypatch.setattr(cudnn, "attention_backward", xla.attention_backward)

    def f(x):
        cudnn.check_packing.__wrapped__()
        return x + 1

    assert jax.jit(f)(1.0) == 2.0


def test_the_packing_check_fails_when_offsets_are_read_wrongly(monkeypatch):
    def shifted(spec, q, k, v, sinks, segments, *rest):
        # The second row's starts are one token off, as when its offsets count from the wrong base.
        return xla.attention_forward(spec, q, k, v, sinks, (segments[0].at[1, 1].add(1), segments[1]))

    def blind(spec, q, k, v, sinks, segments, *rest):
        # Right where there are offsets; whole rows lose their causality.
        spec = dataclasses.replace(spec, causal=spec.causal and not isinstance(segments, cudnn.Covering))
        return xla.attention_forward(spec, q, k, v, sinks, segments)

    def undefined(*arguments):
        dq, dk, dv, _ = xla.attention_backward(*arguments)
        return dq, dk + jnp.nan, dv, None

    for forward, backward in ((shifted, xla.attention_backward), (blind, xla.attention_backward), (xla.attention_forward, undefined)):
        monkeypatch.setattr(cudnn, "attention_forward", forward)
        monkeypatch.setattr(cudnn, "attention_backward", backward)
        with pytest.raises(RuntimeError, match="reads segment offsets differently"):
            cudnn.check_packing.__wrapped__()


def test_one_document_a_row_needs_no_offsets():
    q, k, v = qkv(64, dtype=jnp.bfloat16)

    def operands(documents, **options):
        return cudnn._operands(front._spec(q, **options), q, k, v, cover(segments(*documents), 64), None)

    (*_, lengths, _, _, _, _, _), options = operands([(0, 45)], causal=True)
    assert lengths.size == 0 and options["mask_type"] == cudnn.binding.MaskType.CAUSAL
    for documents, causal in (([(0, 20), (20, 25)], True), ([(0, 45)], False)):
        (*_, lengths, _, _, _, _, _), options = operands(documents, causal=causal)
        assert lengths.shape == (1, len(documents) + 1) and options["mask_type"] != cudnn.binding.MaskType.CAUSAL


@pytest.mark.gpu
def test_the_packing_check_passes_on_this_gpu():
    cudnn.check_packing()


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"dtype": jnp.float32}, "needs bfloat16 or float16, got float32"),
        ({"width": 20}, "multiple of 8 and at most 256, got 20"),
        ({"width": 264}, "multiple of 8 and at most 256, got 264"),
        ({"softcap": 30.0}, "has no soft-cap"),
        ({"sinks": jnp.zeros(2)}, "has no sinks"),
    ],
)
def test_naming_cudnn_where_it_cannot_run_raises_the_reason(change, reason):
    shape = {"dtype": jnp.bfloat16} | {n: x for n, x in change.items() if n in ("dtype", "width")}
    options = {n: x for n, x in change.items() if n not in shape}
    with h200.pretended(), pytest.raises(NotImplementedError, match=reason):
        attention(*qkv(16, **shape), segments=segments((0, 16)), causal=True, backend="cudnn", **options)


def test_naming_cudnn_without_a_gpu_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(h200._kernel, "device", lambda: h200._kernel.Device("cpu"))
    with pytest.raises(NotImplementedError, match="needs a CUDA device of compute capability 9.0 or later, this is cpu"):
        attention(*qkv(16, dtype=jnp.bfloat16), segments=segments((0, 16)), causal=True, backend="cudnn")
