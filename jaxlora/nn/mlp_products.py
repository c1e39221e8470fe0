"""Products of whole MLPs and their gradients: a custom VJP of what they take, the first projections, the activation and the last one.

As in `jaxlora.nn.products`: arrays [N, ·] in and out, weights and adapters as values; all of an MLP's projections are adapted.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlora.nn.products import (
    MANY_ROWS,
    Activation,
    Inputs,
    Weights,
    all_products,
    down,
    kept,
    linear_gradients,
    made_input,
    makes_input,
    marked,
    named,
    norm_statistics,
    padded_b,
    pair_gradient,
    scaled_b,
    split,
    stacked_a,
    sum_over_rows,
)
from jaxlora.typing import Array
from jaxlora.weights.base import (
    AbstractWeight,
    gradients_together,
    input_gradient,
    one_product,
    outer,
    padding,
    product_beside,
    room_beside,
    stay_in_place,
)
from jaxlora.weights.lora import LoRA
from pallas_kernels.adapted_activation import KERNEL as ADAPTED
from pallas_kernels.adapted_activation import adapted_activation
from pallas_kernels.adapted_sum import adapted_sum
from pallas_kernels.functions import Function
from pallas_kernels.gated_gradients import gated_gradients
from pallas_kernels.plain_gradients import plain_gradients

# The input, the activation's name, and what `jaxlora.nn.linear.making_inputs` says.
type How = tuple[Activation, str, bool]
type Scales = tuple[Array | None, ...]
type Pairs = tuple[tuple[Array | None, Array], ...]


def _mlp_forward(how: How, inputs: Inputs, hollow: Array | None, bias: Array | None, weights: Weights, loras: tuple[LoRA, ...]) -> Array:
    return _mlp_fwd(how, inputs, hollow, bias, weights, loras)[0]


mlp_rows = jax.custom_vjp(_mlp_forward, nondiff_argnums=(0,))


def _mlp_fwd(
    how: How, inputs: Inputs, hollow: Array | None, bias: Array | None, weights: Weights, loras: tuple[LoRA, ...]
) -> tuple[Array, Any]:
    into, activation, making = how
    if not any(w.decoded for w in weights[:-1]) or _adapts(how, inputs, bias, weights, loras):
        y, ys, scales, us, last_u, statistics = _mlp_apart(how, inputs, bias, weights, loras)
        return y, (inputs, marked(hollow), ys, scales, bias, us, last_u, weights, loras, statistics)
    rates, keys = (0.0,) * (len(weights) - 1), (None,) * (len(weights) - 1)
    ys, us, statistics = all_products((into, rates, making), inputs, weights[:-1], loras[:-1], keys, None)
    act, wide = _activation(activation, ys, bias)
    (y,), last_us, _ = all_products((act, (0.0,), making), wide, weights[-1:], loras[-1:], (None,), None)
    return y, (inputs, marked(hollow), ys, None, bias, us, last_us[0], weights, loras, statistics)


def _adapts(how: How, inputs: Inputs, bias: Array | None, weights: Weights, loras: tuple[LoRA, ...]) -> bool:
    """Whether a kernel adds the adapters' parts to the first products as it makes the activation: neither these products nor x, with
    nothing beside it, are then any wider for them."""
    _, activation, making = how
    rows, dtype, width = inputs[0].shape[0], inputs[0].dtype, weights[0].shape[0]
    if not making or rows < MANY_ROWS or not all(w.decoded for w in weights[:-1]):
        return False
    updates = [tuple(jax.ShapeDtypeStruct((n, lora.rank), dtype) for n in (rows, width)) for lora in loras[:-1]]
    products = [jax.ShapeDtypeStruct((rows, width), dtype)] * len(updates)
    function = _activation(activation, (), bias)[0]
    return ADAPTED.choose("auto", products, None, updates, loras[-1].a, function=function, bias=bias) != "xla"


@functools.partial(jax.jit, static_argnums=0)
def _mlp_apart(
    how: How, inputs: Inputs, bias: Array | None, weights: Weights, loras: tuple[LoRA, ...]
) -> tuple[Array, Inputs, Scales, dict[int, Array], Array, Array | None]:
    """(y, the first products as they are, the scales of their rows, their adapters' columns, the last one's, a norm's statistics).

    The scales are those of all products, or Nones.
    """
    into, activation, making = how
    *first, last = loras
    if makes_input((into, (0.0,), making), inputs, weights[:-1], loras[:-1]):
        x, _, us, statistics = made_input(into, inputs, loras[:-1], beside=False)
    else:
        x, statistics = into(*inputs), norm_statistics(into, inputs, weights)
        us = kept(down((0.0,) * len(first), x, loras[:-1], None))
    products, scales = zip(*(w.matmul_apart(x) or (w.matmul(x), None) for w in weights[:-1]), strict=True)
    if any(s is not None for s in scales):
        scales = tuple(jnp.ones(len(x), jnp.float32) if s is None else s for s in scales)
    updates = [(u, scaled_b(lora, x.dtype)) for u, lora in zip(us.values(), first, strict=True)]
    function, _ = _activation(activation, products, bias)
    wide = weights[-1].decoded and one_product(weights[-1].shape[1], last.rank)
    spare = padding(weights[-1].shape[1], last.rank) if wide else None
    h, u = adapted_activation(
        products, None if scales[0] is None else scales, updates, last.a.astype(x.dtype), function=function, bias=bias, padding=spare
    )
    # Kept as they are: their updates and scales are few columns, and the backward's pass adds them again.
    u, scales = jax.tree.map(lambda few: checkpoint_name(few, "lora_u"), (u, scales))
    b = scaled_b(last, x.dtype)
    y = product_beside(weights[-1:], h, b) if wide else weights[-1].matmul(h, (u, b))
    return named(y), tuple(map(named, products)), scales, us, u, statistics


def _activation(activation: str, ys: Inputs, bias: Array | None) -> tuple[Function, Inputs]:
    """What makes h, and of what."""
    return (Function("gated", activation), ys) if bias is None else (Function("plain", activation), (*ys, bias))


@functools.partial(jax.jit, static_argnums=0)
def _mlp_bwd(how: How, residuals: Any, dy: Array) -> tuple[Any, ...]:
    into, activation, making = how
    inputs, pending, ys, scales, bias, us, last_u, weights, loras, statistics = residuals
    first, last = loras[:-1], loras[-1]
    unadapted = None if scales is None else tuple((s, scaled_b(lora, dy.dtype)) for s, lora in zip(scales, first, strict=True))
    room = _room(making, bias, weights[:-1], first)
    dys, dbs, da_last = _wide_gradients(activation, ys, unadapted, bias, tuple(us.values()), (weights[-1], last), dy, room)
    pairs, (x, pull) = dict(enumerate(first)), jax.vjp(into, *inputs)
    if room is None:
        dx, du, *_ = linear_gradients(weights[:-1], first, pairs, dys, us, making=making)
    else:
        bs = [b for b in padded_b(first, dy.dtype) if b is not None]
        dx, du, _ = gradients_together(dys[0], weights[:-1], bs, stacked_a(pairs, dy.dtype))
        dys = tuple(jnp.split(dys[0][:, : dys[0].shape[1] - room], len(first), axis=1))
    assert du is not None
    das = split(sum_over_rows(into, inputs, statistics, x, du), pairs, axis=0)
    dloras = [pair_gradient(lora, da, db) for lora, da, db in zip(first, das, dbs, strict=True)]
    # Only where a weight is trained is h computed once more.
    if unadapted is not None:
        ys = tuple(adapted_sum(z, s, u, b) for z, (s, b), u in zip(ys, unadapted, us.values(), strict=True))
    act, wide = _activation(activation, ys, bias)
    dweights = tuple(w.cotangent(*pair) for w, pair in zip(weights, (*((x, each) for each in dys), (act(*wide), dy)), strict=True))
    dbias = None if bias is None else dys[0].astype(jnp.float32).sum(0, keepdims=True).astype(bias.dtype)
    dinputs, dhollow = (pull(dx), None) if pending is None else (None, dx)
    return dinputs, dhollow, dbias, dweights, (*dloras, pair_gradient(last, da_last, outer(dy, last_u)))


def _room(making: bool, bias: Array | None, weights: Weights, loras: tuple[LoRA, ...]) -> int | None:
    """Columns behind the gradients by a gated MLP's first products where these come as one array, for one product; else None."""
    rank = sum(lora.rank for lora in loras)
    fit = all(w.decoded and one_product(w.shape[0], rank) for w in weights)
    if not making or bias is not None or not fit or stay_in_place(weights):
        return None
    return room_beside(weights, rank)


def _wide_gradients(
    activation: str,
    ys: Inputs,
    bs: Pairs | None,
    bias: Array | None,
    us: Inputs,
    last: tuple[AbstractWeight, LoRA],
    dy: Array,
    room: int | None,
) -> tuple[Inputs, Inputs, Array]:
    """(the gradients by an MLP's first products, one array where they have ``room`` behind them; their adapters' dyᵀ u; duᵀ h of ``last``).

    What comes to h, and first products that are yet to be scaled (by ``bs``, also their s·B), are scaled by the kernel that makes all this.
    """
    weight, lora = last
    du, a = dy @ scaled_b(lora, dy.dtype), lora.a.astype(dy.dtype)
    apart = weight.matmul_t_apart((dy,))
    if bias is None:
        (e, g), (u_gate, u_up) = ys, us
        dh, scales = apart or (input_gradient((weight,), (dy,)), None)
        made = gated_gradients(e, g, dh, u_gate, u_up, du, a, scales=scales, unadapted=bs, activation=activation, padding=room)
        *dys, db_gate, db_up, da = made
        return tuple(dys), (db_gate, db_up), da
    # To a product of its own this kernel would lose more by adding the adapter's part than the product does by copying dy beside du.
    dh, update = (input_gradient((weight,), (dy,), (du, a)), None) if apart is None else (apart[0], (apart[1], a))
    de, db, da = plain_gradients(ys[0], bias, dh, us[0], du, update=update, unadapted=None if bs is None else bs[0], activation=activation)
    return (de,), (db,), da


mlp_rows.defvjp(_mlp_fwd, _mlp_bwd)
