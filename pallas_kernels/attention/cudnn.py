"""Packed attention by cuDNN on Hopper and later, through JAX's private binding.

`jax.nn.dot_product_attention` has no packed form: the primitives below it take segments, and this module is the one place that touches
them. cuDNN wants, for B rows of at most M segments, the lengths [B, M] and the starts [B, M + 1], both padded with -1. The last column of
the starts stays -1: an end there makes every row but the first wrong, silently, which is why `check_packing` runs before the first use.

What segments and causality do not say (an interval for each query, tokens that see ahead, a window) is said by an additive mask
[B, 1, S, T] that all heads share. cuDNN then computes all S x T products.
"""

import concurrent.futures
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as binding
from jaxtyping import Array, Float, Int

from pallas_kernels import _kernel
from pallas_kernels.attention import xla
from pallas_kernels.attention.spec import MASKED, Covering, Intervals, KeyValue, Query, Reach, Segments, Spec, cover, key_ranges

_WIDEST_HEAD = 256
# Of the device's memory; a mask lives for one layer's call.
_MASK_SHARE = 1 / 32
# A masked product takes a quarter of the blockwise path's time (Llama Vision's tower, H200), which leaves out blocks beyond a window.
_FASTER = 4
# An element of q and a segment, in the backward: as if each segment had an fp32 sum of the whole row. With 258 windows in a row of 8,192,
# 16 heads of 80, a step took 11 GB more than XLA had planned (H200, cuDNN 9.19).
_WORKSPACE_BYTES = 4


def refuses(
    spec: Spec, q: Query, k: KeyValue, sinks: Float[Array, " H"] | None, reach: Reach, segments: Segments | None = None
) -> str | None:
    """Why cuDNN cannot run this call here, or None."""
    if not jax.__version__.startswith("0.11."):
        return f"the private binding was read for jax 0.11, this is {jax.__version__}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, got {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > _WIDEST_HEAD:
        return f"needs a head size that is a multiple of 8 and at most {_WIDEST_HEAD}, got {q.shape[3]}"
    if spec.softcap is not None:
        return "has no soft-cap"
    if sinks is not None:
        return "has no sinks"
    if segments is not None:
        masked, alone = _masked(spec, segments, reach), _alone(spec, segments)
        reason = _unfit_mask(spec, q, k) if masked else None if alone else _too_large(q, segments[0].shape[1])
        if reason is not None:
            return reason
    return _kernel.device().lacks((9, 0))


def _masked(spec: Spec, segments: Segments, reach: Reach) -> bool:
    """Whether a mask must say what a query sees. cuDNN's own window was never compared with the reference."""
    return isinstance(segments, Intervals) or reach is not None or spec.window is not None


def _alone(spec: Spec, segments: Segments) -> bool:
    """Whether each row is one document, or one from column 0 on, then padding, that causality alone hides from it.

    Without offsets cuDNN needs no sums of its own for each segment, and no kernels around them. The padding sees the document, which nobody
    reads.
    """
    return isinstance(segments, Covering) and segments.starts.shape[1] <= (2 if spec.causal else 1)


def _too_large(q: Query, segments: int) -> str | None:
    """Its backward holds a whole row for each segment."""
    limit, needed = _kernel.device().memory_bytes, _WORKSPACE_BYTES * segments * q.size
    if limit is None or needed <= limit / 8:
        return None
    return f"needs {needed / 1e9:.1f} GB for {segments} segments a row, more than an eighth of the device's {limit / 1e9:.0f} GB"


def _unfit_mask(spec: Spec, q: Query, k: KeyValue) -> str | None:
    """Why there is no mask for this call, or None."""
    (B, S), T = q.shape[:2], k.shape[1]
    if spec.window is not None and T > _FASTER * (spec.window + xla.LARGEST_BLOCK):
        return f"computes all {T} keys of each query, for a window of {spec.window}"
    if S % 2 or T % 2:
        return f"masks even numbers of queries and keys alone, got {S} and {T}"
    limit, needed = _kernel.device().memory_bytes, q.dtype.itemsize * B * S * T
    if limit is None or needed <= limit * _MASK_SHARE:
        return None
    return f"needs a mask of {needed / 1e9:.1f} GB, more than {_MASK_SHARE:.0%} of the device's {limit / 1e9:.0f} GB"


def attention_forward(
    spec: Spec, q: Query, k: KeyValue, v: KeyValue, sinks: None, segments: Segments, reach: Reach = None
) -> tuple[Float[Array, "B S H C"], Float[Array, "N H S"]]:
    """The output in q's dtype, and cuDNN's f32 softmax statistics, one row a segment (N = B * M), for `attention_backward` only."""
    arguments, options = _operands(spec, q, k, v, segments, reach)
    out, statistics = binding._dot_product_attention_fwd_p_wrapper.bind(*arguments, **options, is_training=True)
    return _zero_outside(spec, segments, out), statistics


def attention_backward(
    spec: Spec,
    q: Query,
    k: KeyValue,
    v: KeyValue,
    sinks: None,
    segments: Segments,
    saved: tuple[Float[Array, "B S H C"], Float[Array, "N H S"]],
    dout: Query,
    reach: Reach = None,
) -> tuple[Query, KeyValue, KeyValue, None]:
    """dq, dk, dv and no dsinks; ``saved`` is what the forward pass returned."""
    arguments, options = _operands(spec, q, k, v, segments, reach)
    out, statistics = saved
    masked = _masked(spec, segments, reach)
    if masked:
        # A query that sees nothing has the same weight for every key here.
        dout = _zero_outside(spec, segments, dout)
    dq, dk, dv = binding._dot_product_attention_bwd_p_wrapper.bind(*arguments, statistics, out, dout, **options)
    if not masked:
        dq, dk, dv = (_zero_outside(spec, segments, x) for x in (dq, dk, dv))
    return dq, dk, dv, None


@functools.cache
def check_packing() -> None:
    """Compares cuDNN with "xla" on two rows of 128 tokens, in two segments and as one document, forward and backward; costs seconds, once
    a process, and less where the compilation cache has the program.

    Raises:
      RuntimeError: they differ, so this cuDNN or JAX reads the offsets differently.
    """
    # The caller may be inside a trace, which belongs to its thread; the check needs values.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        errors = thread.submit(packing_errors, attention_forward, attention_backward).result()
    # Not by max(), which may drop a NaN.
    if not all(error < 2e-2 for error in errors.values()):
        raise RuntimeError(
            f"packed cuDNN attention differs from the blockwise path by {errors} (relative), where bfloat16 explains 0.01; "
            "this version of cuDNN or JAX reads segment offsets differently. Pass backend='xla' until it is fixed"
        )


def packing_errors(forward: Any, backward: Any) -> dict[str, float]:
    """Relative errors of out, dq, dk, dv of a (forward, backward) pair against "xla", the larger of two cases: segments that a wrong offset
    convention fails, and whole rows, which go without offsets.
    """
    spec = Spec(causal=True, scale=0.125)
    draw = np.random.default_rng(0)
    arrays = [jnp.asarray(draw.standard_normal((2, 128, 2, 64)), jnp.bfloat16) for _ in range(4)]
    packed = (jnp.array([[0, 48, 0], [0, 80, 0]], jnp.int32), jnp.array([[48, 80, 0], [80, 40, 0]], jnp.int32))
    whole = cover((jnp.zeros((2, 1), jnp.int32), jnp.full((2, 1), 128, jnp.int32)), 128)

    def results(forward: Any, backward: Any, qkv: Sequence[Array], dout: Array, segments: Segments) -> tuple[Array, ...]:
        saved = forward(spec, *qkv, None, segments)
        return (saved[0], *backward(spec, *qkv, None, segments, saved, dout)[:3])

    # One program, which the compilation cache keeps: of a hundred small ones it keeps none.
    @jax.jit
    def errors(arrays: list[Array], cases: Sequence[Any]) -> list[Array]:
        *qkv, dout = (x.astype(jnp.float32) for x in arrays)
        found = []
        for segments in cases:
            right = results(xla.attention_forward, xla.attention_backward, qkv, dout, segments)
            given = results(forward, backward, arrays[:3], arrays[3], segments)
            found.append(jnp.stack([jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact) for y, exact in zip(given, right, strict=True)]))
        return found

    # NaN, which wrong offsets may give, is the largest.
    largest = np.maximum(*map(np.asarray, errors(arrays, (packed, whole))))
    return dict(zip(("out", "dq", "dk", "dv"), largest.tolist(), strict=True))


def _operands(spec: Spec, q: Query, k: KeyValue, v: KeyValue, segments: Segments, reach: Reach) -> tuple[tuple[Array, ...], dict[str, Any]]:
    """The operands and options that the forward and the backward primitive share."""
    unused, masks = jnp.zeros(0, q.dtype), binding.MaskType
    bias, lengths, offsets = unused, unused, unused
    if masked := _masked(spec, segments, reach):
        bias, mask_type = _mask(spec, q, k, segments, reach), masks.NO_MASK
    elif _alone(spec, segments):
        mask_type = masks.CAUSAL if spec.causal else masks.NO_MASK
    else:
        lengths, offsets = packed_segments(segments)
        mask_type = masks.PADDING_CAUSAL if spec.causal else masks.PADDING
    options = {
        "scale": spec.scale,
        "seed": 42,
        "dropout_rate": 0.0,
        # Whether there is a mask, and whether it has a gradient.
        "variadic_args": (masked, False),
        "mask_type": mask_type,
        "layout": binding.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    return (q, k, v, bias, lengths, lengths, offsets, offsets, unused, unused), options


def _mask(spec: Spec, q: Query, k: KeyValue, segments: Segments, reach: Reach) -> Float[Array, "B 1 S T"]:
    """0 where a query sees a key."""
    lo, hi = (bound[:, None, :, None] for bound in key_ranges(spec, segments, q.shape[1], reach))
    key = jnp.arange(k.shape[1], dtype=lo.dtype)[None, None, None, :]
    hidden = max(MASKED, float(jnp.finfo(q.dtype).min) / 4)
    return jnp.where((key >= lo) & (key < hi), 0.0, hidden).astype(q.dtype)


def packed_segments(segments: Segments) -> tuple[Int[Array, "B m"], Int[Array, "B n"]]:
    """Lengths and starts as cuDNN reads them: -1 where unused, the starts with one more column of -1.

    >>> import jax.numpy as jnp
    >>> lengths, offsets = packed_segments((jnp.array([[0, 3]]), jnp.array([[3, 0]])))
    >>> lengths.tolist(), offsets.tolist()
    ([[3, -1]], [[0, -1, -1]])
    """
    starts, lengths = (x.astype(jnp.int32) for x in segments)
    # JAX takes a single column for "not packed" and then ignores the start.
    spare = 1 if starts.shape[1] == 1 else 0
    lengths = jnp.pad(lengths, ((0, 0), (0, spare)))
    starts = jnp.pad(starts, ((0, 0), (0, spare + 1)))
    used = lengths > 0
    return jnp.where(used, lengths, -1), jnp.where(jnp.pad(used, ((0, 0), (0, 1))), starts, -1)


def _zero_outside(spec: Spec, segments: Segments, x: Float[Array, "B S A C"]) -> Float[Array, "B S A C"]:
    # cuDNN does not write the positions that are in no segment.
    if isinstance(segments, Covering):
        return x
    lo, hi = key_ranges(spec, segments, x.shape[1])
    return jnp.where((hi > lo)[:, :, None, None], x, jnp.zeros((), x.dtype))
