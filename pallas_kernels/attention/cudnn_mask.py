"""Attention by cuDNN under a dense mask: a window, tokens that see ahead, an interval of keys for each query. Memory is O(S * T).

What packed offsets can say is faster and smaller without a mask (`cudnn`); a mask is several times as fast as the blockwise path.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as binding
from jaxtyping import Array, Bool, Float

from pallas_kernels.attention import cudnn
from pallas_kernels.attention.spec import KeyValue, Query, Reach, Segments, Spec, key_ranges

_LARGEST_MASK = 2**28
# What generation asks for, a token or a few at a time, is not worth a mask.
_FEWEST_QUERIES = 64


def refuses(
    spec: Spec, q: Query, k: KeyValue, sinks: Float[Array, " H"] | None, reach: Reach, segments: Segments | None = None
) -> str | None:
    """Why cuDNN cannot run this call here under a mask, or None."""
    if q.shape[1] < _FEWEST_QUERIES:
        return f"is for {_FEWEST_QUERIES} queries a row or more, got {q.shape[1]}"
    size = q.shape[0] * q.shape[1] * k.shape[1]
    if size > _LARGEST_MASK:
        return f"needs a mask of {2 * size / 1e9:.1f} GB for rows of {q.shape[1]} queries and {k.shape[1]} keys"
    return cudnn.lacking(spec, q, sinks)


def attention_forward(
    spec: Spec, q: Query, k: KeyValue, v: KeyValue, sinks: None, segments: Segments, reach: Reach = None
) -> tuple[Float[Array, "B S H C"], Float[Array, "B H s"]]:
    """The output in q's dtype, and cuDNN's f32 softmax statistics, for `attention_backward` only."""
    arguments, options, seeing = _masked(spec, q, k, v, segments, reach)
    out, statistics = binding._dot_product_attention_fwd_p_wrapper.bind(*arguments, **options, is_training=True)
    return _where(seeing, out[:, : q.shape[1]]), statistics


def attention_backward(
    spec: Spec,
    q: Query,
    k: KeyValue,
    v: KeyValue,
    sinks: None,
    segments: Segments,
    saved: tuple[Float[Array, "B S H C"], Float[Array, "B H s"]],
    dout: Query,
    reach: Reach = None,
) -> tuple[Query, KeyValue, KeyValue, None]:
    """dq, dk, dv and no dsinks; ``saved`` is what the forward pass returned."""
    arguments, options, seeing = _masked(spec, q, k, v, segments, reach)
    out, statistics = saved
    # A query that sees nothing has the same weight for every key: without a cotangent it changes nothing.
    rest = statistics, _even(out), _even(_where(seeing, dout))
    dq, dk, dv = binding._dot_product_attention_bwd_p_wrapper.bind(*arguments, *rest, **options)
    return dq[:, : q.shape[1]], dk[:, : k.shape[1]], dv[:, : k.shape[1]], None


@functools.cache
def check_mask() -> None:
    """Compares with "xla" once a process, as `cudnn.check_packing` does.

    Raises:
      RuntimeError: they differ, so this cuDNN or JAX reads a mask differently.
    """
    # The caller may be inside a trace; the check needs values.
    with jax.ensure_compile_time_eval():
        errors = cudnn.packing_errors(attention_forward, attention_backward, window=20)
    if not max(errors.values()) < 2e-2:
        raise RuntimeError(
            f"cuDNN attention under a mask differs from the blockwise path by {errors} (relative), where bfloat16 explains 0.01; "
            "this version of cuDNN or JAX reads masks differently. Pass backend='xla' until it is fixed"
        )


def _masked(
    spec: Spec, q: Query, k: KeyValue, v: KeyValue, segments: Segments, reach: Reach
) -> tuple[tuple[Array, ...], dict[str, Any], Bool[Array, "B S"]]:
    """The operands and options that both primitives share, and which queries see anything."""
    lo, hi = key_ranges(spec, segments, q.shape[1], reach)
    q, k, v = (_even(x) for x in (q, k, v))
    low, high = (jnp.pad(x, ((0, 0), (0, q.shape[1] - x.shape[1])))[:, :, None] for x in (lo, hi))
    key = jnp.arange(k.shape[1], dtype=low.dtype)[None, None]
    bias = jnp.where((key >= low) & (key < high), 0.0, 0.7 * float(jnp.finfo(q.dtype).min)).astype(q.dtype)
    unused = jnp.zeros(0, q.dtype)
    options = {
        "scale": spec.scale,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (True, False),
        "mask_type": binding.MaskType.NO_MASK,
        "layout": binding.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    return (q, k, v, bias[:, None], *[unused] * 6), options, hi > lo


def _even(x: Float[Array, "B S A C"]) -> Float[Array, "B s A C"]:
    """cuDNN wants even lengths beside a mask."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))


def _where(seeing: Bool[Array, "B S"], x: Float[Array, "B S A C"]) -> Float[Array, "B S A C"]:
    return jnp.where(seeing[:, :, None, None], x, jnp.zeros((), x.dtype))
