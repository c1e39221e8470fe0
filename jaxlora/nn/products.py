"""Products of adapted weights and their gradients: the custom VJP through which every one goes but those of whole MLPs.

Arrays [N, ·] in and out, weights and adapters as values; `jaxlora.nn.linear` has the modules and says which of these a call takes.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlora.typing import Array, PRNGKeyArray
from jaxlora.weights.base import (
    AbstractWeight,
    contract_last,
    goes_beside,
    goes_together,
    gradients_beside,
    gradients_together,
    input_gradient,
    join,
    one_product,
    outer,
    padded_beside,
    padding,
    product_beside,
    put_together,
    stay_in_place,
)
from jaxlora.weights.lora import LoRA
from pallas_kernels.adapted_sum import adapted_sum
from pallas_kernels.functions import Function
from pallas_kernels.lora_input import KERNEL as INPUT
from pallas_kernels.lora_input import lora_input
from pallas_kernels.lora_swiglu import gated
from pallas_kernels.norm_gradient import KERNEL as NORM_GRADIENT

type Activation = Callable[..., Array]
type Rates = tuple[float, ...]
# The last: what `jaxlora.nn.linear.making_inputs` says.
type How = tuple[Activation, Rates, bool]
type Inputs = tuple[Array, ...]
type Weights = tuple[AbstractWeight, ...]
type Loras = tuple[LoRA | None, ...]

# From here on, cuBLAS takes a few columns faster transposed (8192 x 14336 x 16 on an H100: 107 us and 156).
_MANY_CONTRACTED = 8192
# Below, as in generation, there is too little to read for a kernel to pay.
MANY_ROWS = 2048


def makes_input(how: How, inputs: Sequence[Any], weights: Weights, loras: Loras) -> bool:
    """Whether a kernel makes act(*inputs), with the adapters' columns beside it where the products are of decoded weights and want it so.

    Of inputs, or of their shapes and dtypes.
    """
    act, rates, making = how
    (rows, width), ranks = inputs[0].shape, [lora.rank for lora in loras if lora is not None]
    if not (making and isinstance(act, Function)) or any(rates) or len(ranks) < len(weights) or rows < MANY_ROWS:
        return False
    if _decoded(weights) and not one_product(width, sum(ranks)):
        return False
    a = jax.ShapeDtypeStruct((sum(ranks), width), inputs[0].dtype)
    return INPUT.choose("auto", inputs, a, function=act) != "xla"


def _decoded(weights: Weights) -> bool:
    return all(w.decoded for w in weights)


def makes_gradient(function: Function, inputs: Sequence[Any], weights: Weights, loras: Loras) -> bool:
    """Whether a kernel makes the gradient of a norm function(*inputs), even if none makes the norm: of weights that are not decoded.

    Of inputs, or of their shapes and dtypes.
    """
    x = inputs[0]
    if x.shape[0] < MANY_ROWS or all(lora is None for lora in loras) or not weights[0].joins(weights[1:]):
        return False
    return NORM_GRADIENT.choose("auto", inputs, x, x, function=function) != "xla"


def identity(x: Array) -> Array:
    """x, where the Linears take what is there already."""
    return x


# Layers of different kinds have Linears of the same shapes: what is jitted here is one function of the program, which all of them call.
@functools.partial(jax.jit, static_argnums=0)
def all_products(
    how: How, inputs: Inputs, weights: Weights, loras: Loras, keys: Any, value: Array | None
) -> tuple[tuple[Array, ...], dict[int, Array], Array | None]:
    """The y_i, the columns u_i = A_i drop_i(x) of those with an adapter, and the statistics of a norm whose gradient a kernel makes."""
    act, rates, _ = how
    if value is None and makes_input(how, inputs, weights, loras):
        beside = _decoded(weights)
        made, columns, us, statistics = made_input(act, inputs, loras, beside=beside)
        return _wide_ys(made, weights, loras, columns) if beside else _ys(made, weights, loras, us), us, statistics
    x = act(*inputs) if value is None else value
    # Kept before they are used: a product that is computed again does not need them again.
    us = kept(down(rates, x, loras, keys))
    return _ys(x, weights, loras, us), us, norm_statistics(act, inputs, weights)


def made_input(act: Activation, inputs: Inputs, loras: Loras, *, beside: bool) -> tuple[Array, Array, dict[int, Array], Array | None]:
    """(x = act(*inputs), [x, u, 0] where it is to be ``beside``; u; the u_i; a norm's statistics), as a kernel makes them."""
    assert isinstance(act, Function)
    pairs, x = {i: lora for i, lora in enumerate(loras) if lora is not None}, inputs[0]
    a = stacked_a(pairs, x.dtype)
    made, u, statistics = lora_input(inputs, a, function=act, padding=padding(x.shape[1], len(a)) if beside else None)
    us = kept(dict(enumerate(split(u, pairs, axis=1))))
    return made, u, us, None if statistics is None else checkpoint_name(statistics, "lora_u")


def norm_statistics(act: Activation, inputs: Inputs, weights: Weights) -> Array | None:
    """A norm's statistics, where no kernel makes them but one makes its gradient; None of what is no norm."""
    statistics = act.statistics(inputs[0]) if isinstance(act, Function) and not _decoded(weights) else None
    return None if statistics is None else checkpoint_name(statistics, "lora_u")


def kept(us: dict[int, Array]) -> dict[int, Array]:
    """A few columns a Linear, for which the backward would read x once more."""
    return {i: checkpoint_name(u, "lora_u") for i, u in us.items()}


def _forward(
    how: How, inputs: Inputs, hollow: Array | None, weights: Weights, loras: Loras, keys: Any, value: Array | None
) -> tuple[Array, ...]:
    return all_products(how, inputs, weights, loras, keys, value)[0]


project_rows = jax.custom_vjp(_forward, nondiff_argnums=(0,))


def _project_fwd(
    how: How, inputs: Inputs, hollow: Array | None, weights: Weights, loras: Loras, keys: Any, value: Array | None
) -> tuple[tuple[Array, ...], Any]:
    ys, us, statistics = all_products(how, inputs, weights, loras, keys, value)
    return ys, (inputs, marked(hollow), weights, loras, keys, us, statistics)


def sum_over_rows(act: Activation, inputs: Inputs, statistics: Array | None, x: Array, du: Array) -> Array:
    """duᵀ x of x = act(*inputs), which a norm's statistics save from being made."""
    return outer(du, x) if statistics is None or not isinstance(act, Function) else act.sum_over_rows(du, inputs, statistics)


def marked(hollow: Array | None) -> tuple[()] | None:
    """Whether there is one, in the structure of what is saved: the zeros themselves are not to be kept."""
    return None if hollow is None else ()


def _ys(x: Array, weights: Weights, loras: Loras, us: dict[int, Array]) -> tuple[Array, ...]:
    """y_i = W_i x + s_i B_i u_i. All Linears get the same columns u, B_i being zero at the others', so that [x, u] is one array."""
    if not us:
        return tuple(named(w.matmul(x)) for w in weights)
    columns, bs = _columns(loras, us, x.dtype)
    if len(us) == len(weights) > 1 and join(weights, x.shape[1], columns.shape[1]):
        return _wide_ys(padded_beside(x, columns), weights, loras, columns)
    return tuple(named(w.matmul(x) if b is None else w.matmul(x, (columns, b))) for w, b in zip(weights, bs, strict=True))


def _wide_ys(both: Array, weights: Weights, loras: Loras, columns: Array) -> tuple[Array, ...]:
    """`_ys` of [x, u, 0], where all Linears have adapters."""
    bs = [b for b in padded_b(loras, both.dtype) if b is not None]
    if len(weights) > 1 and join(weights, weights[0].shape[1], columns.shape[1]):
        joined = named(product_beside(weights, both, jnp.concatenate(bs)))
        return tuple(jnp.split(joined, _starts(w.shape[0] for w in weights)[1:-1], axis=1))
    return tuple(named(product_beside((w,), both, b)) for w, b in zip(weights, bs, strict=True))


def named(y: Array) -> Array:
    """A product, for the policies that keep products."""
    return checkpoint_name(y, "dot")


def _columns(loras: Loras, us: dict[int, Array], dtype: Any) -> tuple[Array, list[Array | None]]:
    """All adapters' columns u [N, R], and each Linear's `padded_b`."""
    return jnp.concatenate([us[i] for i in sorted(us)], axis=1), padded_b(loras, dtype)


def padded_b(loras: Loras, dtype: Any) -> list[Array | None]:
    """Each Linear's s·B [O, R], zero at the others' columns; None where there is no adapter."""
    *starts, total = _starts(0 if lora is None else lora.rank for lora in loras)
    return [
        None if lora is None else jnp.pad(scaled_b(lora, dtype), ((0, 0), (at, total - at - lora.rank)))
        for lora, at in zip(loras, starts, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=0)
def _project_bwd(how: How, residuals: Any, dys: tuple[Array, ...]) -> tuple[Any, ...]:
    act, rates, making = how
    inputs, pending, weights, loras, keys, us, statistics = residuals
    x, pull = jax.vjp(act, *inputs)
    pairs = {i: lora for i, lora in enumerate(loras) if lora is not None}
    plain = {i: lora for i, lora in pairs.items() if not rates[i]}
    dx, du, dus, dbs = linear_gradients(weights, loras, plain, dys, us, making=making)
    das = {} if du is None else dict(zip(plain, split(sum_over_rows(act, inputs, statistics, x, du), plain, axis=0), strict=True))
    for i in pairs.keys() - plain.keys():
        kept = _keep(keys[i], rates[i], x)
        dx = dx + (dus[i] @ pairs[i].a.astype(x.dtype)) * kept
        das[i] = outer(dus[i], x * kept)
    dloras = tuple(None if lora is None else pair_gradient(lora, das[i], dbs[i]) for i, lora in enumerate(loras))
    dinputs, dhollow = (pull(dx), None) if pending is None else (None, dx)
    return dinputs, dhollow, tuple(w.cotangent(x, dy) for w, dy in zip(weights, dys, strict=True)), dloras, None, None


project_rows.defvjp(_project_fwd, _project_bwd)


def linear_gradients(
    weights: Weights, loras: Loras, plain: Mapping[int, LoRA], dys: Inputs, us: Mapping[int, Array], *, making: bool
) -> tuple[Array, Array | None, dict[int, Array], dict[int, Array]]:
    """(dx without the dropped adapters' parts, the du of the ``plain`` ones side by side, each adapter's du where it was made alone, each
    adapter's dyᵀ u).

    ``making`` is what `jaxlora.nn.linear.making_inputs` says.
    """
    dtype = dys[0].dtype
    bs = [b for b in padded_b(loras, dtype) if b is not None]
    # Where blocks wait in host memory, XLA would begin to fetch the next one too late if fewer products were left to run.
    if making and len(plain) == len(weights) and goes_together(weights, bs[0].shape[1]):
        dx, du, both = gradients_together(put_together(dys, weights, bs[0].shape[1]), weights, bs, stacked_a(plain, dtype))
        sums = outer(both, jnp.concatenate([us[i] for i in plain], axis=1))
        starts, firsts = _starts(w.shape[0] for w in weights), _starts(lora.rank for lora in plain.values())
        return dx, du, {}, {i: sums[starts[i] : starts[i + 1], firsts[i] : firsts[i + 1]] for i in plain}
    dbs = {i: outer(dys[i], us[i]) for i, lora in enumerate(loras) if lora is not None}
    if len(plain) == len(weights) and goes_beside(weights, bs[0].shape[1]):
        both, du = gradients_beside(dys, weights, bs)
        return adapted_sum(both, None, du, stacked_a(plain, dtype).T), du, {}, dbs
    dus = {i: _narrow_product(dys[i], scaled_b(lora, dtype)) for i, lora in enumerate(loras) if lora is not None}
    # The undropped A of the group enter dx, and are differentiated, as one product.
    du = jnp.concatenate([dus[i] for i in plain], axis=1) if plain else None
    update = None if du is None else (du, stacked_a(plain, dtype))
    if update is not None and stay_in_place(weights):
        return adapted_sum(input_gradient(weights, dys), None, update[0], update[1].T), du, dus, dbs
    return input_gradient(weights, dys, update), du, dus, dbs


def _narrow_product(dy: Array, b: Array) -> Array:
    """dy @ b of a few columns b."""
    if len(b) < _MANY_CONTRACTED:
        return dy @ b
    # The barrier: XLA would otherwise turn b back.
    return contract_last(dy, jax.lax.optimization_barrier(b.T))


def _starts(sizes: Iterable[int]) -> list[int]:
    """Where each part begins, and where the last one ends."""
    return [0, *itertools.accumulate(sizes)]


def _gated_forward(how: tuple[str, str], x: Array, weights: Weights, loras: Loras) -> tuple[Array, Array, Array]:
    return _gated_fwd(how, x, weights, loras)[0]


gated_rows = jax.custom_vjp(_gated_forward, nondiff_argnums=(0,))


def _gated_fwd(how: tuple[str, str], x: Array, weights: Weights, loras: Loras) -> tuple[tuple[Array, Array, Array], Any]:
    activation, backend = how
    us = kept(down((0.0, 0.0), x, loras, None))
    columns, bs = _columns(loras, us, x.dtype) if us else (None, [])
    update: Any = (columns, *bs) if us else None
    gate, up = (w.packed() for w in weights)
    assert gate is not None and up is not None
    h, e, g = gated(x, gate, up, update, activation=activation, backend=backend)
    return (e, g, h), ((x,), None, weights, loras, (None, None), us, None)


def _gated_bwd(how: tuple[str, str], residuals: Any, cotangents: tuple[Array, Array, Array]) -> tuple[Any, ...]:
    (dx,), _, dweights, dloras, _, _ = _project_bwd((identity, (0.0, 0.0), False), residuals, cotangents[:2])
    return dx, dweights, dloras


gated_rows.defvjp(_gated_fwd, _gated_bwd)


def down(rates: Rates, x: Array, loras: Loras, keys: Any) -> dict[int, Array]:
    """u_i = A_i drop_i(x) [N, R_i] of each adapted Linear; the undropped ones as one product."""
    plain = {i: lora for i, lora in enumerate(loras) if lora is not None and not rates[i]}
    us = dict(zip(plain, split(contract_last(x, stacked_a(plain, x.dtype)), plain, axis=1), strict=True)) if plain else {}
    for i, lora in enumerate(loras):
        if lora is not None and rates[i]:
            us[i] = contract_last(x * _keep(keys[i], rates[i], x), lora.a.astype(x.dtype))
    return us


def scaled_b(lora: LoRA, dtype: Any) -> Array:
    """s·B, scaled in fp32 and rounded once."""
    return (lora.scale * lora.b).astype(dtype)


def stacked_a(loras: Mapping[int, LoRA], dtype: Any) -> Array:
    """All A [R, I], on top of each other."""
    return jnp.concatenate([lora.a for lora in loras.values()]).astype(dtype)


def split(stacked: Array, loras: Mapping[int, LoRA], *, axis: int) -> list[Array]:
    """Each adapter's part of what is stacked by rank."""
    return jnp.split(stacked, _starts(lora.rank for lora in loras.values())[1:-1], axis=axis)


def pair_gradient(lora: LoRA, da: Array, db: Array) -> LoRA:
    """Of the sums over the rows da = duᵀ x and db = dyᵀ u."""
    return LoRA(da.astype(lora.a.dtype), (lora.scale * db).astype(lora.b.dtype), jnp.zeros_like(lora.scale))


def _keep(key: PRNGKeyArray, rate: float, x: Array) -> Array:
    """1 / (1 - rate) where an element is kept, else 0."""
    return jax.random.bernoulli(key, 1 - rate, x.shape).astype(x.dtype) / (1 - rate)
