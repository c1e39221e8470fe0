"""Cross entropy of a linear head without its logits: the product and the loss run in chunks of labelled tokens.

For one labelled token with hidden state h, head W and optional adapter (a, b, scale):

    s = logit_scale * (W h + scale * b a h),  t = softcap * tanh(s / softcap),  loss = logsumexp(t) - t[label]
    g = (softmax(t) - onehot(label)) * (1 - (t / softcap)^2) * logit_scale
    dh = W^T g + scale * a^T b^T g,  dW = g h^T,  da = scale * b^T g h^T,  db = scale * g (a h)^T,  dscale = (a h) . (b^T g)

The loss is a sum, so the gradients of a chunk need nothing from the other chunks: they are computed beside its loss, while its logits are
there, and the backward pass only multiplies them by the cotangent. Chunking over the vocabulary instead is Cut Cross-Entropy (Wijmans et
al. 2024, arXiv:2411.09009); computing the gradients in the forward pass is Liger Kernel's idea (Hsu et al. 2024, arXiv:2410.10989)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._kernel import Case, Kernel
from pallas_kernels.logsumexp import logsumexp

type Hidden = Float[Array, "N D"]
type Head = Float[Array, "V D"]
type Labels = Int[Array, " N"]
type Adapter = tuple[Float[Array, "R D"], Float[Array, "V R"], Float[Array, ""]]


def linear_cross_entropy(
    hidden: Hidden,
    weight: Head,
    labels: Labels,
    *,
    weight_grad: bool,
    lora: Adapter | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    chunk: int = 512,
) -> Float[Array, ""]:
    """The f32 sum over tokens of -log softmax(cap(logit_scale * (hidden W^T + scale * (hidden a^T) b^T)))[label]; the caller divides.

    A token labelled ``ignore_index`` counts for nothing and costs nothing: labelled tokens are compacted to the front and a while loop runs
    ceil(labelled / chunk) times. Without labels the loss and all gradients are 0. A label outside [0, V) makes the loss NaN: a traced
    function cannot raise.

    Products in hidden's dtype, accumulated in f32; softmax, loss and the sums over chunks in f32; each gradient in its argument's dtype.
    ``weight_grad=False`` says that the head is frozen: its gradient is then 0, and no [V, D] buffer is made. Memory is O(chunk * V), plus
    an f32 [V, D] with ``weight_grad``; `jax.value_and_grad` runs one pass, a call without differentiation computes no gradient.

    >>> import jax.numpy as jnp
    >>> loss = linear_cross_entropy(jnp.ones((3, 2)), jnp.zeros((4, 2)), jnp.array([1, -100, 3]), weight_grad=False)
    >>> round(float(loss) / 2, 4) == round(float(jnp.log(4)), 4)
    True

    Raises:
      ValueError: shapes disagree or an option is out of range.
    """
    _check(hidden, weight, labels, lora, softcap, chunk)
    spec = _Spec(
        chunk=min(chunk, max(hidden.shape[0], 1)),
        weight_grad=weight_grad,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
    )
    return _loss(spec, hidden, weight, lora, labels)


def reference(
    hidden: Hidden,
    weight: Head,
    labels: Labels,
    *,
    weight_grad: bool,
    lora: Adapter | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> Float[Array, ""]:
    """The arguments and result of `linear_cross_entropy`, by the definition; builds [N, V] in f32."""
    weight = weight if weight_grad else lax.stop_gradient(weight)
    hidden, weight = hidden.astype(jnp.float32), weight.astype(jnp.float32)
    logits = hidden @ weight.T
    if lora is not None:
        a, b, scale = (x.astype(jnp.float32) for x in lora)
        logits = logits + scale * ((hidden @ a.T) @ b.T)
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    labelled = labels != ignore_index
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), jnp.where(labelled, labels, 0)[:, None], axis=-1)[:, 0]
    return -jnp.sum(jnp.where(labelled, picked, 0.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spec:
    chunk: int
    weight_grad: bool
    softcap: float | None
    logit_scale: float
    ignore_index: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(spec: _Spec, hidden: Hidden, weight: Head, lora: Adapter | None, labels: Labels) -> Float[Array, ""]:
    return _sum_over_chunks(spec, hidden, weight, lora, labels, gradients=False)[0]


def _forward(spec, hidden, weight, lora, labels):
    loss, gradients = _sum_over_chunks(spec, hidden, weight, lora, labels, gradients=True)
    # An array of no elements carries the dtype that the weight's gradient must have.
    like = jnp.zeros((0, *weight.shape), weight.dtype)
    return loss, (gradients, like, lora)


def _backward(spec, residuals, cotangent):
    (dhidden, dweight, dlora), like, lora = residuals

    def scaled(gradient, dtype):
        return (gradient.astype(jnp.float32) * cotangent).astype(dtype)

    dweight = scaled(dweight, like.dtype) if spec.weight_grad else jnp.zeros(like.shape[1:], like.dtype)
    dlora = None if lora is None else tuple(scaled(d, x.dtype) for d, x in zip(dlora, lora, strict=True))
    return scaled(dhidden, dhidden.dtype), dweight, dlora, None


_loss.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames=("spec", "gradients"))
def _sum_over_chunks(
    spec: _Spec, hidden: Hidden, weight: Head, lora: Adapter | None, labels: Labels, *, gradients: bool
) -> tuple[Float[Array, ""], tuple[Hidden | None, Head | None, Adapter | None]]:
    """The loss, and its gradients by hidden (in its dtype), by the weight and by the adapter (f32): what is not asked for is None."""
    tokens, count = _labelled_first(labels, spec.ignore_index, spec.chunk)
    head = weight.astype(hidden.dtype)
    adapter = None if lora is None else (lora[0].astype(hidden.dtype), lora[1].astype(hidden.dtype), lora[2].astype(jnp.float32))

    def add_chunk(i: Array | int, sums: tuple[Array, Any]) -> tuple[Array, Any]:
        loss, (dhidden, dweight, dlora) = sums
        rows = lax.dynamic_slice_in_dim(tokens, i * spec.chunk, spec.chunk)
        h = hidden.at[rows].get(mode="fill", fill_value=0)
        y = labels.at[rows].get(mode="fill", fill_value=spec.ignore_index)
        chunk_loss, g, z = _chunk(spec, h, head, adapter, y)
        if not gradients:
            return loss + chunk_loss, (None, None, None)
        dh = _dot(g, head)
        if spec.weight_grad:
            dweight += _dot(g.T, h)
        if adapter is not None and z is not None:
            a, b, scale = adapter
            gb = _dot(g, b)
            dh += scale * _dot(gb.astype(a.dtype), a)
            step = (scale * _dot(gb.T.astype(h.dtype), h), scale * _dot(g.T, z.astype(h.dtype)), jnp.sum(gb * z))
            dlora = jax.tree.map(jnp.add, dlora, step)
        # Every row is written once, so its dtype costs no accumulated error; rows past the end are dropped.
        dhidden = dhidden.at[rows].set(dh.astype(hidden.dtype), mode="drop", unique_indices=True)
        return loss + chunk_loss, (dhidden, dweight, dlora)

    def zeros(x: Any) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), x)

    none = (None, None, None)
    start = (jnp.zeros(hidden.shape, hidden.dtype), zeros(weight) if spec.weight_grad else None, zeros(lora)) if gradients else none
    return lax.fori_loop(0, _chunks(count, spec.chunk), add_chunk, (jnp.zeros((), jnp.float32), start))


def _labelled_first(labels: Labels, ignore_index: int, chunk: int) -> tuple[Int[Array, " n"], Int[Array, ""]]:
    """Token numbers, labelled ones first and in order, the rest N + 0, N + 1, … (out of range, all different), padded to whole chunks.

    >>> import jax.numpy as jnp
    >>> tokens, count = _labelled_first(jnp.array([-100, 7, -100, 9]), -100, 3)
    >>> tokens.tolist(), int(count)
    ([1, 3, 6, 7, 8, 9], 2)
    """
    size = labels.shape[0]
    ignored = labels == ignore_index
    count = jnp.sum(~ignored, dtype=jnp.int32)
    order = jnp.argsort(ignored, stable=True).astype(jnp.int32)
    slot = jnp.arange(-(-size // chunk) * chunk, dtype=jnp.int32)
    return jnp.where(slot < count, jnp.pad(order, (0, slot.size - size)), size + slot), count


def _chunks(count: Int[Array, ""], chunk: int) -> Int[Array, ""]:
    return (count + chunk - 1) // chunk


def _chunk(
    spec: _Spec, h: Float[Array, "c D"], head: Head, adapter: Adapter | None, y: Int[Array, " c"]
) -> tuple[Float[Array, ""], Float[Array, "c V"], Float[Array, "c R"] | None]:
    """The chunk's loss, g (the gradient by W h, in h's dtype), and z = h a^T (f32)."""
    t = _dot(h, head.T)
    z = None
    if adapter is not None:
        a, b, scale = adapter
        z = _dot(h, a.T)
        t += scale * _dot(z.astype(h.dtype), b.T)
    t *= spec.logit_scale
    slope = spec.logit_scale
    if spec.softcap is not None:
        bent = jnp.tanh(t / spec.softcap)
        t, slope = spec.softcap * bent, spec.logit_scale * (1.0 - bent * bent)
    labelled = y != spec.ignore_index
    hit = jnp.arange(t.shape[1], dtype=y.dtype)[None, :] == y[:, None]
    # What is bent or added to is made anew by whatever reads it; for a kernel it would have to be written first.
    bare = adapter is None and spec.softcap is None and spec.logit_scale == 1.0
    lse = logsumexp(t, backend="auto" if bare else "xla")
    loss = lse - jnp.sum(jnp.where(hit, t, 0.0), axis=1)
    outside = labelled & ((y < 0) | (y >= t.shape[1]))
    loss = jnp.sum(jnp.where(outside, jnp.nan, jnp.where(labelled, loss, 0.0)))
    g = jnp.where(labelled[:, None], (jnp.exp(t - lse[:, None]) - hit) * slope, 0.0)
    return loss, g.astype(h.dtype), z


def _dot(x: Float[Array, "A C"], y: Float[Array, "C E"]) -> Float[Array, "A E"]:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _check(hidden: Hidden, weight: Head, labels: Labels, lora: Adapter | None, softcap: float | None, chunk: int) -> None:
    faults = []
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        faults.append(f"expected hidden [N, D], weight [V, D], labels [N], got {hidden.shape}, {weight.shape}, {labels.shape}")
    if lora is not None and (lora[0].shape[1:] != hidden.shape[1:] or lora[1].shape != (weight.shape[0], lora[0].shape[0])):
        faults.append(f"expected lora a [R, D] and b [V, R], got {lora[0].shape} and {lora[1].shape}; were they swapped?")
    if chunk < 1:
        faults.append(f"chunk must be at least 1, got {chunk}")
    if softcap is not None and softcap <= 0:
        faults.append(f"softcap must be positive, got {softcap}; pass None for no cap")
    if faults:
        raise ValueError("; ".join(faults))


def _case(dtype: Any, *, shape: tuple[int, int, int], labelled: float = 0.6, rank: int = 0, chunk: int = 1024, **static: Any) -> Case:
    """``shape`` is (N, D, V); ``labelled`` is the share of tokens with a label."""
    draw = np.random.default_rng(0)
    n, d, v = shape
    arrays: dict[str, Any] = {
        "hidden": jnp.asarray(draw.standard_normal((n, d)), dtype),
        "weight": jnp.asarray(draw.standard_normal((v, d)) * d**-0.5, dtype),
        "labels": jnp.asarray(np.where(draw.random(n) < labelled, draw.integers(0, v, n), -100), jnp.int32),
    }
    if rank:
        a, b = draw.standard_normal((rank, d)) * d**-0.5, draw.standard_normal((v, rank))
        arrays["lora"] = (jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), jnp.asarray(0.5, jnp.float32))
    wrt = ("hidden", *(["weight"] if static["weight_grad"] else []), *(["lora"] if rank else []))
    return Case(arrays=arrays, static=static, wrt=wrt, tuning={"chunk": chunk})


CASES = {
    "frozen_head": functools.partial(_case, shape=(29, 16, 37), weight_grad=False),
    "trained_head": functools.partial(_case, shape=(29, 16, 37), weight_grad=True),
    "adapted_head": functools.partial(_case, shape=(29, 16, 37), weight_grad=False, rank=3),
    "trained_and_adapted": functools.partial(_case, shape=(32, 16, 40), weight_grad=True, rank=2),
    "softcap": functools.partial(_case, shape=(21, 16, 33), weight_grad=True, softcap=1.5),
    "logit_scale": functools.partial(_case, shape=(21, 16, 33), weight_grad=True, logit_scale=0.25),
    "everything": functools.partial(_case, shape=(45, 16, 33), weight_grad=True, rank=2, softcap=2.0, logit_scale=1.5),
    "every_token_labelled": functools.partial(_case, shape=(24, 16, 32), weight_grad=True, labelled=1.1),
    "no_token_labelled": functools.partial(_case, shape=(24, 16, 32), weight_grad=True, labelled=-1.0, rank=2),
    "fewer_tokens_than_a_chunk": functools.partial(_case, shape=(5, 16, 32), weight_grad=True, chunk=512),
}

KERNEL = Kernel(
    name="linear_cross_entropy",
    reference=reference,
    backends={"xla": linear_cross_entropy},
    refuses=lambda backend, *args, **kwargs: None,
    cases=CASES,
    # 16-bit: g is rounded to the activation dtype before its products, and dhidden when it is stored.
    tolerance={"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3},
)
