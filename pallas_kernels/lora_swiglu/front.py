"""The one entry to act(gate x) ∘ up x, its reference, its custom VJP, and its record."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import packed
from pallas_kernels._kernel import Case, Kernel
from pallas_kernels.int4_matmul import KERNEL as PRODUCT
from pallas_kernels.int4_matmul import int4_matmul
from pallas_kernels.lora_swiglu import mosaic, triton, xla
from pallas_kernels.lora_swiglu.activations import ACTIVATIONS, product
from pallas_kernels.packed import Packed, Weight

_BACKENDS = {"xla": xla, "mosaic": mosaic, "triton": triton}

# Two adapters may have two ranks.
type Pair = tuple[Float[Array, "_ I"], Float[Array, "F _"]]
type Pairs = tuple[Pair, Pair] | None
# u [N, R] of all adapters' columns, and each weight's b [F, R], zero at the other's columns.
type Columns = tuple[Float[Array, "N R"], Float[Array, "F R"], Float[Array, "F R"]] | None


def lora_swiglu(
    x: Float[Array, "N I"], gate: Weight, up: Weight, lora: Pairs = None, *, activation: str = "silu", backend: str = "auto"
) -> Float[Array, "N F"]:
    """h = act(e) ∘ g with e = W_gate x + b_gate a_gate x and g = W_up x + b_up a_up x, in one pass over x.

    A weight [F, I] is `Packed` (int4, NF4) or dense; an adapter is (a [R, I], b [F, R]) with its scale in b. ``activation`` is "silu"
    (SwiGLU, Shazeer 2020, arXiv:2002.05202), "gelu" or "gelu_tanh". Products in x's dtype, accumulated in fp32 together with the adapters'
    part; e and g are rounded to x's dtype, act is computed in fp32 and rounded before it multiplies, as two products apart would do.

    Saved for the backward: x, the weights as they are, a x, e and g. It computes h again in the pass that makes de and dg, which enter one
    input gradient product. Codes have no gradient; a dense weight has.

    >>> import jax.numpy as jnp
    >>> lora_swiglu(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.ones((1, 2))).round(3).tolist()
    [[3.5230002403259277]]

    Raises:
      ValueError: shapes or dtypes disagree, or nobody knows the activation or the backend.
      NotImplementedError: the named backend cannot run this call; the text says why.
    """
    _check(x, gate, up, lora, activation)
    return _swiglu(activation, KERNEL.choose(backend, x, gate, up, lora, activation=activation), x, gate, up, lora)


def gated(
    x: Float[Array, "N I"], gate: Weight, up: Weight, update: Columns, *, activation: str, backend: str
) -> tuple[Float[Array, "N F"], Float[Array, "N F"], Float[Array, "N F"]]:
    """(h, e, g) by a named backend, for a caller with a VJP of its own."""
    return _BACKENDS[backend].gated(x, gate, up, update, activation)


def reference(x: Float[Array, "N I"], gate: Weight, up: Weight, lora: Pairs = None, *, activation: str = "silu") -> Float[Array, "N F"]:
    """The arguments and result of `lora_swiglu`, by the definition; computed in fp32."""
    x32 = x.astype(jnp.float32)
    e, g = (x32 @ packed.reference_decode(w, x.dtype).T for w in (gate, up))
    if lora is not None:
        (a_gate, b_gate), (a_up, b_up) = jax.tree.map(lambda part: part.astype(jnp.float32), lora)
        e, g = e + (x32 @ a_gate.T) @ b_gate.T, g + (x32 @ a_up.T) @ b_up.T
    return (ACTIVATIONS[activation](e) * g).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _swiglu(activation: str, backend: str, x: Array, gate: Weight, up: Weight, lora: Pairs) -> Array:
    return gated(x, gate, up, _update(x, lora), activation=activation, backend=backend)[0]


def _forward(activation, backend, x, gate, up, lora):
    update = _update(x, lora)
    h, e, g = gated(x, gate, up, update, activation=activation, backend=backend)
    return h, (x, gate, up, lora, None if update is None else update[0], e, g)


def _backward(activation, backend, saved, dh):
    x, gate, up, lora, u, e, g = saved
    de, dg = jax.vjp(functools.partial(product, activation=activation), e, g)[1](dh)
    both = jnp.concatenate([de, dg], axis=1)
    dx = _input_gradient(both, gate, up, lora, backend)
    dweights = tuple(None if isinstance(w, Packed) else _outer(dy, x).astype(w.dtype) for w, dy in ((gate, de), (up, dg)))
    if lora is None:
        return dx, *dweights, None
    us = jnp.split(u, [lora[0][0].shape[0]], axis=1)
    dlora = tuple(
        (_outer(dy @ b.astype(dy.dtype), x).astype(a.dtype), _outer(dy, part).astype(b.dtype))
        for (a, b), dy, part in zip(lora, (de, dg), us, strict=True)
    )
    return dx, *dweights, dlora


_swiglu.defvjp(_forward, _backward)


def _input_gradient(both: Array, gate: Weight, up: Weight, lora: Pairs, backend: str) -> Array:
    """[de, dg] times the weights on top of each other, plus the adapters' part."""
    update = None
    if lora is not None:
        (a_gate, b_gate), (a_up, b_up) = jax.tree.map(lambda part: part.astype(both.dtype), lora)
        du = [part @ b for part, b in zip(jnp.split(both, 2, axis=1), (b_gate, b_up), strict=True)]
        update = jnp.concatenate(du, axis=1), jnp.concatenate([a_gate, a_up]).T
    if isinstance(gate, Packed) and isinstance(up, Packed) and _alike(gate, up):
        stacked = Packed(jnp.concatenate([gate.codes, up.codes]), jnp.concatenate([gate.scales, up.scales]), gate.code_book, gate.width)
        # Tiles of the gradient fit other shapes than those of the product.
        able = PRODUCT.refuses(backend, both, stacked, update, transpose=True) is None
        return int4_matmul(both, stacked, update, transpose=True, backend=backend if able else "xla")
    dx = both @ jnp.concatenate([packed.decode(w, both.dtype) for w in (gate, up)])
    return dx if update is None else dx + update[0] @ update[1].T


def _alike(gate: Packed, up: Packed) -> bool:
    return gate.format == up.format == "int4" and gate.width == up.width


def _update(x: Array, lora: Pairs) -> Columns:
    if lora is None:
        return None
    (a_gate, b_gate), (a_up, b_up) = jax.tree.map(lambda part: part.astype(x.dtype), lora)
    u = jax.lax.dot_general(x, jnp.concatenate([a_gate, a_up]), (((1,), (1,)), ((), ())))
    return u, jnp.pad(b_gate, ((0, 0), (0, b_up.shape[1]))), jnp.pad(b_up, ((0, 0), (b_gate.shape[1], 0)))


def _outer(dy: Array, x: Array) -> Array:
    return jax.lax.dot_general(dy, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _check(x: Array, gate: Weight, up: Weight, lora: Pairs, activation: str) -> None:
    faults = []
    if x.ndim != 2 or gate.shape != up.shape or x.shape[1] != gate.shape[1]:
        faults.append(f"expected x [N, I] and two weights [F, I], got {x.shape}, {gate.shape} and {up.shape}")
    if activation not in ACTIVATIONS:
        faults.append(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    for name, adapter in zip(("gate", "up"), lora or (), strict=False):
        a, b = adapter
        if a.shape[1:] != x.shape[1:] or b.shape != (gate.shape[0], a.shape[0]):
            faults.append(f"expected the {name}'s a [R, {x.shape[1]}] and b [{gate.shape[0]}, R], got {a.shape} and {b.shape}")
    if faults:
        raise ValueError("; ".join(faults))


def _refuses(backend: str, x: Array, gate: Weight, up: Weight, lora: Pairs = None, *, activation: str = "silu") -> str | None:
    ranks = 0 if lora is None else sum(a.shape[0] for a, _ in lora)
    return _BACKENDS[backend].refuses(x, gate, up, ranks, activation)


def _case(
    dtype: Any, *, rows: int, shape: tuple[int, int], forms: tuple[str, str] = ("int4", "int4"), ranks: Any = None, **static: Any
) -> Case:
    draw = np.random.default_rng(0)
    arrays: dict[str, Any] = {"x": jnp.asarray(draw.standard_normal((rows, shape[1])), dtype)}
    arrays |= {name: packed.random(draw, shape, form, dtype) for name, form in zip(("gate", "up"), forms, strict=True)}
    if ranks:
        arrays["lora"] = tuple(
            (
                jnp.asarray(draw.standard_normal((r, shape[1])) * shape[1] ** -0.5, dtype),
                jnp.asarray(draw.standard_normal((shape[0], r)) * r**-0.5, dtype),
            )
            for r in ranks
        )
    dense = [name for name, form in zip(("gate", "up"), forms, strict=True) if form == "dense"]
    return Case(arrays=arrays, static=static, wrt=("x", *dense, *(["lora"] if ranks else [])))


CASES = {
    "plain": functools.partial(_case, rows=64, shape=(128, 128)),
    "gelu": functools.partial(_case, rows=64, shape=(128, 128), ranks=(8, 8), activation="gelu"),
    "gelu_tanh": functools.partial(_case, rows=64, shape=(256, 192), ranks=(16, 16), activation="gelu_tanh"),
    "ragged_everywhere": functools.partial(_case, rows=45, shape=(70, 100), ranks=(3, 2)),
    "nf4": functools.partial(_case, rows=64, shape=(128, 192), forms=("nf4", "nf4"), ranks=(8, 8)),
    "two_formats": functools.partial(_case, rows=64, shape=(128, 192), forms=("int4", "dense"), ranks=(8, 8)),
    "several_tiles": functools.partial(_case, rows=300, shape=(512, 448), ranks=(5, 3)),
}

KERNEL = Kernel(
    name="lora_swiglu",
    reference=reference,
    backends={name: functools.partial(lora_swiglu, backend=name) for name in _BACKENDS},
    refuses=_refuses,
    cases=CASES,
    # 16-bit: e, g and act(e) are rounded before they multiply, and de, dg before their products.
    tolerance={"float32": 1e-5, "bfloat16": 1e-2},
)
