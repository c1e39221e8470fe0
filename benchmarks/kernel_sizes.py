"""The calls that ``benchmarks.kernels`` times: the sizes of each kernel in training, by its name."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import Case
from pallas_kernels.attention import cover

DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """One call: ``case(key)`` draws its arguments on the device.

    ``flops`` are those of the forward pass and of both passes. ``plain`` is the same function as a user would write it in JAX, or None
    where that needs more memory than there is; ``reference`` says whether the kernel's own contract fits as well.
    """

    case: Callable[[Any], Case]
    flops: tuple[float, float]
    plain: Callable[..., Any] | None = None
    reference: bool = True


def _attention(rows: int, length: int, heads: tuple[int, int], width: int, *, causal: bool, dense: bool = True) -> Size:
    """Rows of one segment each; ``dense`` says that [B, H, S, S] in f32 fits."""

    def case(key: Any) -> Case:
        keys = jax.random.split(key, 3)
        shapes = ((rows, length, n, width) for n in (heads[0], heads[1], heads[1]))
        q, k, v = (jax.random.normal(k, shape, DTYPE) for k, shape in zip(keys, shapes, strict=True))
        segments = cover((jnp.zeros((rows, 1), jnp.int32), jnp.full((rows, 1), length, jnp.int32)), length)
        return Case(arrays={"q": q, "k": k, "v": v, "segments": segments}, static={"causal": causal}, wrt=("q", "k", "v"))

    forward = 4.0 * rows * heads[0] * length**2 * width * (0.5 if causal else 1.0)
    # Five products instead of two.
    return Size(case=case, flops=(forward, 3.5 * forward), plain=_dense_attention if dense else None, reference=dense)


def _dense_attention(q: Any, k: Any, v: Any, segments: Any, *, causal: bool) -> Any:
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="xla")


def _cross_entropy(tokens: int, width: int, vocabulary: int, *, weight_grad: bool) -> Size:
    """Every token labelled."""

    def case(key: Any) -> Case:
        keys = jax.random.split(key, 3)
        arrays = {
            "hidden": jax.random.normal(keys[0], (tokens, width), DTYPE),
            "weight": jax.random.normal(keys[1], (vocabulary, width), DTYPE) * jnp.asarray(width**-0.5, DTYPE),
            "labels": jax.random.randint(keys[2], (tokens,), 0, vocabulary),
        }
        return Case(arrays=arrays, static={"weight_grad": weight_grad}, wrt=("hidden", "weight") if weight_grad else ("hidden",))

    product = 2.0 * math.prod((tokens, width, vocabulary))
    return Size(case=case, flops=(product, product * (3 if weight_grad else 2)), plain=_plain_cross_entropy)


def _plain_cross_entropy(hidden: Any, weight: Any, labels: Any, *, weight_grad: bool) -> Any:
    logits = jnp.einsum("nd,vd->nv", hidden, weight if weight_grad else jax.lax.stop_gradient(weight), preferred_element_type=jnp.float32)
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0])


SIZES: Mapping[str, Mapping[str, Size]] = {
    "attention": {
        "llama-3.1-8b, 4 x 2048": _attention(4, 2048, (32, 8), 128, causal=True),
        "llama-3.1-8b, 2 x 4096": _attention(2, 4096, (32, 8), 128, causal=True),
        "llama-3.1-8b, 1 x 32768": _attention(1, 32768, (32, 8), 128, causal=True, dense=False),
        "qwen2-vl tower, 4 x 4096": _attention(4, 4096, (16, 16), 80, causal=False),
    },
    "linear_cross_entropy": {
        "llama-3.1-8b, 8192 tokens": _cross_entropy(8192, 4096, 128256, weight_grad=False),
        "llama-3.1-8b, trained head": _cross_entropy(8192, 4096, 128256, weight_grad=True),
    },
}
