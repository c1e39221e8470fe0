"""The calls that ``benchmarks.kernels`` times: the sizes of each kernel in training, by its name."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import Case, Packed
from pallas_kernels.attention import Intervals, cover
from pallas_kernels.functions import Function
from pallas_kernels.packed import GROUP

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


def _tiled_images(images: int, tokens: int, padding: int, heads: int, width: int) -> Size:
    """Llama Vision's tower: every token sees all, padding the tokens; no segments, but an interval of keys for each query."""
    length = tokens + padding

    def case(key: Any) -> Case:
        q, k, v = (jax.random.normal(one, (images, length, heads, width), DTYPE) for one in jax.random.split(key, 3))
        ends = jnp.broadcast_to(jnp.where(jnp.arange(length) < tokens, length, tokens).astype(jnp.int32), (images, length))
        segments = Intervals(jnp.zeros_like(ends), ends)
        return Case(arrays={"q": q, "k": k, "v": v, "segments": segments}, static={"causal": False}, wrt=("q", "k", "v"))

    forward = 4.0 * images * heads * length**2 * width
    return Size(case=case, flops=(forward, 3.5 * forward))


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


def _packed(key: Any, shape: tuple[int, int]) -> Packed:
    """An int4 weight with codes and scales of its own in every group."""
    codes, scales = jax.random.split(key)
    drawn = jax.random.bits(codes, (shape[0], shape[1] // 2), jnp.uint8)
    sizes = (0.5 + jax.random.uniform(scales, (shape[0], shape[1] // GROUP))) * shape[1] ** -0.5 / 4.6
    return Packed(drawn, sizes.astype(jnp.bfloat16), None, shape[1])


def _product(rows: int, shape: tuple[int, int], rank: int, *, transpose: bool = False) -> Size:
    contracted, out = shape if transpose else shape[::-1]

    def case(key: Any) -> Case:
        x, w, u, b = jax.random.split(key, 4)
        update = jax.random.normal(u, (rows, rank), DTYPE), jax.random.normal(b, (out, rank), DTYPE)
        arrays = {"x": jax.random.normal(x, (rows, contracted), DTYPE), "weight": _packed(w, shape), "update": update}
        return Case(arrays=arrays, static={"transpose": transpose}, wrt=("x", "update"))

    product = 2.0 * math.prod((rows, *shape))
    return Size(case=case, flops=(product, 2 * product))


def _swiglu(rows: int, shape: tuple[int, int], rank: int) -> Size:
    def case(key: Any) -> Case:
        x, gate, up, *low = jax.random.split(key, 7)
        scales, shapes = (shape[1] ** -0.5, rank**-0.5), ((rank, shape[1]), (shape[0], rank))
        parts = [scale * jax.random.normal(k, s, DTYPE) for k, s, scale in zip(low, shapes * 2, scales * 2, strict=True)]
        arrays = {"x": jax.random.normal(x, (rows, shape[1]), DTYPE), "gate": _packed(gate, shape), "up": _packed(up, shape)}
        return Case(arrays={**arrays, "lora": (tuple(parts[:2]), tuple(parts[2:]))}, static={"activation": "silu"}, wrt=("x", "lora"))

    products = 4.0 * math.prod((rows, *shape))
    return Size(case=case, flops=(products, 2 * products))


def _gated_gradients(rows: int, columns: int, rank: int) -> Size:
    def case(key: Any) -> Case:
        keys = jax.random.split(key, 7)
        arrays = {n: jax.random.normal(k, (rows, columns), DTYPE) for n, k in zip(("e", "g", "dh"), keys[:3], strict=True)}
        arrays["a"] = jax.random.normal(keys[6], (rank, columns), DTYPE)
        arrays |= {n: jax.random.normal(k, (rows, rank), DTYPE) for n, k in zip(("u_gate", "u_up", "du"), keys[3:6], strict=True)}
        return Case(arrays=arrays, static={}, wrt=())

    flops = 8.0 * rows * columns * rank
    return Size(case=case, flops=(flops, flops))


def _plain_gradients(rows: int, columns: int, rank: int) -> Size:
    def case(key: Any) -> Case:
        keys = jax.random.split(key, 5)
        arrays = {n: jax.random.normal(k, (rows, columns), DTYPE) for n, k in zip(("e", "dh"), keys[:2], strict=True)}
        arrays |= {n: jax.random.normal(k, (rows, rank), DTYPE) for n, k in zip(("u", "du"), keys[2:4], strict=True)}
        arrays["bias"] = jax.random.normal(keys[4], (1, columns), DTYPE)
        return Case(arrays=arrays, static={"activation": "quick_gelu"}, wrt=())

    flops = 4.0 * rows * columns * rank
    return Size(case=case, flops=(flops, flops))


def _inputs(key: Any, function: Function, rows: int, columns: int) -> tuple[Any, ...]:
    """The inputs of a function of rows: those as wide as the result, then weights and biases."""
    wide, narrow = function.inputs
    shapes = [(rows, columns)] * wide + [(1, columns)] * narrow
    return tuple(jax.random.normal(k, shape, DTYPE) for k, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True))


def _lora_input(rows: int, columns: int, rank: int, function: Function) -> Size:
    def case(key: Any) -> Case:
        a = jax.random.normal(jax.random.fold_in(key, 1), (rank, columns), DTYPE)
        return Case(arrays={"inputs": _inputs(key, function, rows, columns), "a": a}, static={"function": function}, wrt=())

    flops = 2.0 * rows * columns * rank
    return Size(case=case, flops=(flops, flops))


def _norm_gradient(rows: int, columns: int, function: Function) -> Size:
    def case(key: Any) -> Case:
        dy, past = (jax.random.normal(k, (rows, columns), DTYPE) for k in jax.random.split(key))
        arrays = {"inputs": _inputs(key, function, rows, columns), "dy": dy, "past": past}
        return Case(arrays=arrays, static={"function": function}, wrt=())

    flops = 10.0 * rows * columns
    return Size(case=case, flops=(flops, flops))


def _adapted_activation(rows: int, columns: int, rank: int, function: Function) -> Size:
    wide, biases = function.inputs

    def case(key: Any) -> Case:
        *keys, last, row = jax.random.split(key, 3 * wide + 2)
        shapes = [shape for shape in ((rows, columns), (rows, rank), (columns, rank)) for _ in range(wide)]
        drawn = [jax.random.normal(k, shape, DTYPE) for k, shape in zip(keys, shapes, strict=True)]
        updates = tuple(zip(drawn[wide : 2 * wide], drawn[2 * wide :], strict=True))
        arrays: dict[str, Any] = {"products": tuple(drawn[:wide]), "updates": updates}
        arrays |= {"scales": (jnp.full(rows, 0.5, jnp.float32),) * wide, "a": jax.random.normal(last, (rank, columns), DTYPE)}
        arrays |= {"bias": jax.random.normal(row, (1, columns), DTYPE)} if biases else {}
        return Case(arrays=arrays, static={"function": function}, wrt=())

    flops = 2.0 * (wide + 1) * rows * columns * rank
    return Size(case=case, flops=(flops, flops))


def _adapted_sum(rows: int, columns: int, rank: int) -> Size:
    def case(key: Any) -> Case:
        shapes = {"z": (rows, columns), "u": (rows, rank), "b": (columns, rank)}
        drawn = {n: jax.random.normal(k, s, DTYPE) for k, (n, s) in zip(jax.random.split(key, 3), shapes.items(), strict=True)}
        return Case(arrays={**drawn, "scales": jnp.full(rows, 0.5, jnp.float32)}, static={}, wrt=())

    flops = 2.0 * rows * columns * rank
    return Size(case=case, flops=(flops, flops))


def _logsumexp(rows: int, columns: int) -> Size:
    def case(key: Any) -> Case:
        return Case(arrays={"t": jax.random.normal(key, (rows, columns), jnp.float32)}, static={}, wrt=())

    flops = 2.0 * rows * columns
    return Size(case=case, flops=(flops, flops))


def _float8_rows(rows: int, columns: int) -> Size:
    def case(key: Any) -> Case:
        return Case(arrays={"x": jax.random.normal(key, (rows, columns), DTYPE)}, static={}, wrt=())

    flops = 2.0 * rows * columns
    return Size(case=case, flops=(flops, flops))


def _float8_transposed(shape: tuple[int, int]) -> Size:
    def case(key: Any) -> Case:
        return Case(arrays={"weights": [_packed(key, shape)], "scale": jnp.float32(shape[1] ** -0.5 / 64)}, static={}, wrt=())

    flops = 2.0 * math.prod(shape)
    return Size(case=case, flops=(flops, flops))


def _float8_weight(shape: tuple[int, int]) -> Size:
    def case(key: Any) -> Case:
        return Case(arrays={"weight": _packed(key, shape), "scale": jnp.float32(shape[1] ** -0.5 / 64)}, static={}, wrt=())

    flops = 2.0 * math.prod(shape)
    return Size(case=case, flops=(flops, flops))


_RMS, _LAYER = Function("rms_norm", eps=1e-5), Function("layer_norm", eps=1e-6)

SIZES: Mapping[str, Mapping[str, Size]] = {
    "attention": {
        "llama-3.1-8b, 4 x 2048": _attention(4, 2048, (32, 8), 128, causal=True),
        "llama-3.1-8b, 2 x 4096": _attention(2, 4096, (32, 8), 128, causal=True),
        "llama-3.1-8b, 1 x 32768": _attention(1, 32768, (32, 8), 128, causal=True, dense=False),
        "qwen2-vl tower, 4 x 4096": _attention(4, 4096, (16, 16), 80, causal=False),
        "llama-vision tower, 2 x 6432": _tiled_images(2, 6404, 28, 16, 80),
    },
    "int4_matmul": {
        "8192 x 4096 -> 14336": _product(8192, (14336, 4096), 16),
        "8192 x 4096 -> 4096": _product(8192, (4096, 4096), 16),
        "8192 x 14336 -> 4096": _product(8192, (4096, 14336), 16),
        "8192 x 14336 -> 4096, transposed": _product(8192, (14336, 4096), 16, transpose=True),
        "128 x 4096 -> 14336": _product(128, (14336, 4096), 16),
    },
    "lora_swiglu": {
        "8192 x 4096 -> 14336": _swiglu(8192, (14336, 4096), 16),
        "2048 x 4096 -> 14336": _swiglu(2048, (14336, 4096), 16),
    },
    "gated_gradients": {
        "8192 x 14336, r 16": _gated_gradients(8192, 14336, 16),
        "8192 x 18944, r 16": _gated_gradients(8192, 18944, 16),
    },
    "plain_gradients": {
        "16384 x 5120, r 16": _plain_gradients(16384, 5120, 16),
    },
    "lora_input": {
        "rms_norm, 8192 x 4096, r 32": _lora_input(8192, 4096, 32, _RMS),
        "layer_norm, 16384 x 1280, r 16": _lora_input(16384, 1280, 16, _LAYER),
        "silu, 8192 x 14336, r 16": _lora_input(8192, 14336, 16, Function("gated", "silu")),
        "quick_gelu, 16384 x 5120, r 16": _lora_input(16384, 5120, 16, Function("plain", "quick_gelu")),
    },
    "norm_gradient": {
        "rms_norm, 8192 x 4096": _norm_gradient(8192, 4096, _RMS),
        "layer_norm, 16384 x 1280": _norm_gradient(16384, 1280, _LAYER),
    },
    "adapted_activation": {
        "silu, 8192 x 14336, r 16": _adapted_activation(8192, 14336, 16, Function("gated", "silu")),
        "quick_gelu, 16384 x 5120, r 16": _adapted_activation(16384, 5120, 16, Function("plain", "quick_gelu")),
    },
    "adapted_sum": {
        "8192 x 4096, r 16": _adapted_sum(8192, 4096, 16),
        "8192 x 6144, r 48": _adapted_sum(8192, 6144, 48),
    },
    "logsumexp": {
        "512 x 128256": _logsumexp(512, 128256),
    },
    "float8_rows": {
        "8192 x 4096": _float8_rows(8192, 4096),
        "8192 x 14336": _float8_rows(8192, 14336),
    },
    "float8_transposed": {
        "14336 x 4096": _float8_transposed((14336, 4096)),
        "4096 x 14336": _float8_transposed((4096, 14336)),
    },
    "float8_weight": {
        "14336 x 4096": _float8_weight((14336, 4096)),
        "4096 x 14336": _float8_weight((4096, 14336)),
    },
    "linear_cross_entropy": {
        "llama-3.1-8b, 8192 tokens": _cross_entropy(8192, 4096, 128256, weight_grad=False),
        "llama-3.1-8b, trained head": _cross_entropy(8192, 4096, 128256, weight_grad=True),
    },
}
