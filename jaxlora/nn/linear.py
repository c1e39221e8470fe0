"""The one Linear, and the one custom VJP through which every adapted product goes."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlora.typing import Array, Float, PRNGKeyArray
from jaxlora.weights.base import (
    AbstractWeight,
    abstract,
    contract_last,
    goes_beside,
    gradients_beside,
    input_gradient,
    join,
    joined_product,
    outer,
)
from jaxlora.weights.dense import Dense
from jaxlora.weights.lora import LoRA
from pallas_kernels.gated_gradients import KERNEL as GRADIENTS
from pallas_kernels.gated_gradients import gated_gradients
from pallas_kernels.lora_swiglu import KERNEL as GATED
from pallas_kernels.lora_swiglu import gated
from pallas_kernels.lora_swiglu.activations import PRODUCTS

type Activation = Callable[..., Array]
type Rates = tuple[float, ...]
type How = tuple[Activation, Rates]
type Inputs = tuple[Array, ...]
type Weights = tuple[AbstractWeight, ...]
type Loras = tuple[LoRA | None, ...]


class Linear(nnx.Module):
    """y = W x + s·B·A·x + bias: a weight [O, I] in any format, an optional adapter and an optional bias.

    Made without values; ``load`` fills the weight, ``adapt.attach`` the adapter. A ``tied`` Linear (an output head that shares the
    embedding's table) has no weight of its own.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, dtype: Any = jnp.bfloat16, tied: bool = False):
        self.features = (out_features, in_features)
        self.weight: nnx.Param[Any] | None = nnx.data(None if tied else nnx.Param(Dense.abstract(self.features, dtype)))
        self.bias: nnx.Param[Any] | None = nnx.data(nnx.Param(abstract((out_features,), dtype)) if bias else None)
        self.lora_A: nnx.Param[Any] | None = nnx.data(None)
        self.lora_B: nnx.Param[Any] | None = nnx.data(None)
        self.lora_scale: nnx.Param[Any] | None = nnx.data(None)
        self.lora_dropout = 0.0

    @property
    def lora(self) -> LoRA | None:
        """The adapter, if one is attached."""
        if self.lora_A is None or self.lora_B is None or self.lora_scale is None:
            return None
        return LoRA(self.lora_A.get_value(), self.lora_B.get_value(), self.lora_scale.get_value())

    def attach(self, lora: LoRA, *, dropout: float = 0.0) -> None:
        """Puts an adapter (or its abstract shape) into the slot."""
        self.lora_A, self.lora_B, self.lora_scale = (nnx.data(nnx.Param(v)) for v in (lora.a, lora.b, lora.scale))
        self.lora_dropout = dropout

    def __call__(self, x: Float[Array, "*N I"], key: PRNGKeyArray | None = None) -> Float[Array, "*N O"]:
        """A group of one."""
        return project((self,), x, None if key is None else (key,))[0]


def project(
    linears: Sequence[Linear], x: Float[Array, "*N I"], keys: Sequence[PRNGKeyArray | None] | None = None
) -> tuple[Float[Array, "*N O"], ...]:
    """y_i = W_i x + s_i·B_i·A_i·drop_i(x) + bias_i for Linears that share their input.

    The products run in x's dtype with fp32 accumulation; the A of the group are one product. Saved for the backward: x and the
    stored (packed) weights. dA and dB are returned in fp32. Dropout is applied where a Linear has a rate and ``keys`` are given (one
    a Linear; None where it has no rate); its mask is drawn again in the backward.
    """
    return _project_from(_identity, linears, (x,), keys)


def project_activated(
    linear: Linear,
    act: Activation,
    inputs: Sequence[Float[Array, "*N I"]],
    key: PRNGKeyArray | None = None,
    *,
    value: Float[Array, "*N I"] | None = None,
) -> Float[Array, "*N O"]:
    """y = W h + s·B·A·h + bias of h = act(*inputs), an elementwise function: ``linear(act(*inputs), key)``.

    Saved for the backward are the inputs, not h, which is computed again in the pass over them that makes their gradients. ``value`` is h,
    where a kernel has made it already.
    """
    return _project_from(act, (linear,), inputs, None if key is None else (key,), value)[0]


def project_gated(
    linears: tuple[Linear, Linear], x: Float[Array, "*N I"], activation: str, keys: Sequence[PRNGKeyArray | None]
) -> tuple[tuple[Float[Array, "*N F"], Float[Array, "*N F"]], Float[Array, "*N F"] | None]:
    """((e, g), h): the two projections of x and, where a kernel makes all three in one pass, h = act(e) ∘ g; else None.

    The kernel is `pallas_kernels.lora_swiglu`'s backend that was measured to be fastest here. h has no gradient: whoever uses it takes it
    for the value of act(e) ∘ g, and differentiates that.
    """
    rows = x.reshape(-1, x.shape[-1])
    backend = _gated_backend(linears, rows, activation, keys)
    if backend is None:
        e, g = project(linears, x, keys)
        return (e, g), None
    weights, loras = tuple(_weight(linear) for linear in linears), tuple(linear.lora for linear in linears)
    e, g, h = (y.reshape(*x.shape[:-1], -1) for y in _gated((activation, backend), rows, weights, loras))
    return (_named(e), _named(g)), jax.lax.stop_gradient(h)


def project_mlp(
    linears: tuple[Linear, Linear, Linear], x: Float[Array, "*N I"], activation: str, keys: Sequence[PRNGKeyArray | None]
) -> Float[Array, "*N O"] | None:
    """down(act(gate x) ∘ up x) of gate, up and down, where a kernel makes the wide gradients and the adapters' sums over them in one pass.

    The kernel is `pallas_kernels.gated_gradients`. None where it cannot run, and where its pass would not be all: with dropout, with
    biases, or where one of the three has no adapter.
    """
    weights, loras = tuple(_weight(linear) for linear in linears), tuple(lora for linear in linears if (lora := linear.lora) is not None)
    drops = any(linear.lora_dropout and key is not None for linear, key in zip(linears, keys, strict=True))
    if drops or len(loras) < len(linears) or any(linear.bias is not None for linear in linears):
        return None
    rows = x.reshape(-1, x.shape[-1])
    wide, *columns = (jax.ShapeDtypeStruct((rows.shape[0], n), x.dtype) for n in (weights[0].shape[0], *(lora.rank for lora in loras)))
    if GRADIENTS.choose("auto", wide, wide, wide, *columns, activation=activation) == "xla":
        return None
    return _mlp(activation, rows, weights, loras).reshape(*x.shape[:-1], -1)


def _gated_backend(linears: Sequence[Linear], x: Array, activation: str, keys: Sequence[Any]) -> str | None:
    """A fused kernel's backend, where one can run and was measured to be faster than two products."""
    weights, loras = [_weight(linear).packed() for linear in linears], [linear.lora for linear in linears]
    drops = any(linear.lora_dropout and key is not None for linear, key in zip(linears, keys, strict=True))
    biased, alone = any(linear.bias is not None for linear in linears), sum(lora is None for lora in loras) == 1
    if drops or biased or alone or any(weight is None for weight in weights):
        return None
    pairs = [(lora.a, lora.b) for lora in loras if lora is not None]
    chosen = GATED.choose("auto", x, *weights, tuple(pairs) or None, activation=activation)
    return None if chosen == "xla" else chosen


def _project_from(
    act: Activation, linears: Sequence[Linear], inputs: Sequence[Array], keys: Any, value: Array | None = None
) -> tuple[Array, ...]:
    leading = inputs[0].shape[:-1]
    rows = tuple(x.reshape(-1, x.shape[-1]) for x in inputs)
    value = None if value is None else value.reshape(-1, value.shape[-1])
    weights = tuple(_weight(linear) for linear in linears)
    loras = tuple(linear.lora for linear in linears)
    keys = keys or (None,) * len(weights)
    rates = tuple(
        0.0 if key is None or lora is None else linear.lora_dropout for linear, lora, key in zip(linears, loras, keys, strict=True)
    )
    used = tuple(key if rate else None for rate, key in zip(rates, keys, strict=True))
    ys = _project((act, rates), rows, weights, loras, used, value)
    biased = (
        y if linear.bias is None else y + linear.bias.get_value().astype(y.dtype)[None] for y, linear in zip(ys, linears, strict=True)
    )
    return tuple(y.reshape(*leading, y.shape[-1]) for y in biased)


def _identity(x: Array) -> Array:
    return x


def _weight(linear: Linear) -> AbstractWeight:
    if linear.weight is None:
        raise ValueError("this Linear is tied to the embedding: multiply by the embedding's table instead")
    return linear.weight.get_value()


# Layers of different kinds have Linears of the same shapes: what is jitted here is one function of the program, which all of them call.
@functools.partial(jax.jit, static_argnums=0)
def _products(
    how: How, inputs: Inputs, weights: Weights, loras: Loras, keys: Any, value: Array | None
) -> tuple[tuple[Array, ...], dict[int, Array]]:
    """The y_i, and the columns u_i = A_i drop_i(x) of those with an adapter."""
    act, rates = how
    x = act(*inputs) if value is None else value
    # A few columns a Linear, for which the backward would read x once more.
    us = {i: checkpoint_name(u, "lora_u") for i, u in _down(rates, x, loras, keys).items()}
    return _ys(x, weights, loras, us), us


def _forward(how: How, inputs: Inputs, weights: Weights, loras: Loras, keys: Any, value: Array | None) -> tuple[Array, ...]:
    return _products(how, inputs, weights, loras, keys, value)[0]


_project = jax.custom_vjp(_forward, nondiff_argnums=(0,))


def _project_fwd(how: How, inputs: Inputs, weights: Weights, loras: Loras, keys: Any, value: Array | None) -> tuple[tuple[Array, ...], Any]:
    ys, us = _products(how, inputs, weights, loras, keys, value)
    return ys, (inputs, weights, loras, keys, us)


def _ys(x: Array, weights: Weights, loras: Loras, us: dict[int, Array]) -> tuple[Array, ...]:
    """y_i = W_i x + s_i B_i u_i. All Linears get the same columns u, B_i being zero at the others', so that [x, u] is one array."""
    if not us:
        return tuple(_named(w.matmul(x)) for w in weights)
    columns, bs = _columns(loras, us, x.dtype)
    if len(us) == len(weights) > 1 and join(weights, x, columns):
        joined = _named(joined_product(weights, x, (columns, jnp.concatenate([b for b in bs if b is not None]))))
        return tuple(jnp.split(joined, list(itertools.accumulate(w.shape[0] for w in weights))[:-1], axis=1))
    return tuple(_named(w.matmul(x) if b is None else w.matmul(x, (columns, b))) for w, b in zip(weights, bs, strict=True))


def _named(y: Array) -> Array:
    """A product, for the policies that keep products."""
    return checkpoint_name(y, "dot")


def _columns(loras: Loras, us: dict[int, Array], dtype: Any) -> tuple[Array, list[Array | None]]:
    """All adapters' columns u [N, R], and each Linear's `_padded_b`."""
    return jnp.concatenate([us[i] for i in sorted(us)], axis=1), _padded_b(loras, dtype)


def _padded_b(loras: Loras, dtype: Any) -> list[Array | None]:
    """Each Linear's s·B [O, R], zero at the others' columns; None where there is no adapter."""
    bs, at, columns = [], 0, sum(lora.rank for lora in loras if lora is not None)
    for lora in loras:
        if lora is None:
            bs.append(None)
            continue
        bs.append(jnp.pad(_scaled(lora, dtype), ((0, 0), (at, columns - at - lora.rank))))
        at += lora.rank
    return bs


@functools.partial(jax.jit, static_argnums=0)
def _project_bwd(how: How, residuals: Any, dys: tuple[Array, ...]) -> tuple[Any, ...]:
    act, rates = how
    inputs, weights, loras, keys, us = residuals
    x, pull = jax.vjp(act, *inputs)
    pairs = {i: lora for i, lora in enumerate(loras) if lora is not None}
    plain = {i: lora for i, lora in pairs.items() if not rates[i]}
    dx, du, dus = _plain_gradients(weights, loras, plain, dys)
    das = {} if du is None else dict(zip(plain, _split(outer(du, x), plain, axis=0), strict=True))
    for i in pairs.keys() - plain.keys():
        kept = _keep(keys[i], rates[i], x)
        dx = dx + (dus[i] @ pairs[i].a.astype(x.dtype)) * kept
        das[i] = outer(dus[i], x * kept)
    dloras = tuple(None if lora is None else _pair_gradient(lora, das[i], outer(dys[i], us[i])) for i, lora in enumerate(loras))
    return pull(dx), tuple(w.cotangent(x, dy) for w, dy in zip(weights, dys, strict=True)), dloras, None, None


_project.defvjp(_project_fwd, _project_bwd)


def _plain_gradients(
    weights: Weights, loras: Loras, plain: Mapping[int, LoRA], dys: Inputs
) -> tuple[Array, Array | None, dict[int, Array]]:
    """(dx without the dropped adapters' parts, the du of the ``plain`` ones side by side, each adapter's du where it was made alone)."""
    dtype = dys[0].dtype
    bs = [b for b in _padded_b(loras, dtype) if b is not None]
    if len(plain) == len(weights) and goes_beside(dys, weights, bs[0]):
        return *gradients_beside(dys, weights, bs, _stacked_a(plain, dtype)), {}
    dus = {i: dys[i] @ _scaled(lora, dtype) for i, lora in enumerate(loras) if lora is not None}
    # The undropped A of the group enter dx, and are differentiated, as one product.
    du = jnp.concatenate([dus[i] for i in plain], axis=1) if plain else None
    return input_gradient(weights, dys, None if du is None else (du, _stacked_a(plain, dtype))), du, dus


def _mlp_forward(activation: str, x: Array, weights: Weights, loras: tuple[LoRA, ...]) -> Array:
    return _mlp_fwd(activation, x, weights, loras)[0]


_mlp = jax.custom_vjp(_mlp_forward, nondiff_argnums=(0,))


def _mlp_fwd(activation: str, x: Array, weights: Weights, loras: tuple[LoRA, ...]) -> tuple[Array, Any]:
    (e, g), us = _products((_identity, (0.0, 0.0)), (x,), weights[:2], loras[:2], (None, None), None)
    (y,), down_us = _products((PRODUCTS[activation], (0.0,)), (e, g), weights[2:], loras[2:], (None,), None)
    return y, (x, e, g, us, down_us[0], weights, loras)


@functools.partial(jax.jit, static_argnums=0)
def _mlp_bwd(activation: str, residuals: Any, dy: Array) -> tuple[Any, ...]:
    x, e, g, us, down_u, weights, loras = residuals
    down = loras[2]
    du = dy @ _scaled(down, dy.dtype)
    dh = input_gradient(weights[2:], (dy,), (du, down.a.astype(dy.dtype)))
    de, dg, *dbs, da = gated_gradients(e, g, dh, us[0], us[1], du, activation=activation)
    pairs = dict(enumerate(loras[:2]))
    dx, both, _ = _plain_gradients(weights[:2], loras[:2], pairs, (de, dg))
    assert both is not None
    das = _split(outer(both, x), pairs, axis=0)
    dloras = [_pair_gradient(lora, da, db) for lora, da, db in zip(pairs.values(), das, dbs, strict=True)]
    # Only where a weight is trained is h computed once more.
    h = PRODUCTS[activation](e, g)
    dweights = tuple(w.cotangent(*pair) for w, pair in zip(weights, ((x, de), (x, dg), (h, dy)), strict=True))
    return dx, dweights, (*dloras, _pair_gradient(down, da, outer(dy, down_u)))


_mlp.defvjp(_mlp_fwd, _mlp_bwd)


def _gated_forward(how: tuple[str, str], x: Array, weights: Weights, loras: Loras) -> tuple[Array, Array, Array]:
    return _gated_fwd(how, x, weights, loras)[0]


_gated = jax.custom_vjp(_gated_forward, nondiff_argnums=(0,))


def _gated_fwd(how: tuple[str, str], x: Array, weights: Weights, loras: Loras) -> tuple[tuple[Array, Array, Array], Any]:
    activation, backend = how
    us = {i: checkpoint_name(u, "lora_u") for i, u in _down((0.0, 0.0), x, loras, None).items()}
    columns, bs = _columns(loras, us, x.dtype) if us else (None, [])
    update: Any = (columns, *bs) if us else None
    gate, up = (w.packed() for w in weights)
    assert gate is not None and up is not None
    h, e, g = gated(x, gate, up, update, activation=activation, backend=backend)
    return (e, g, h), ((x,), weights, loras, (None, None), us)


def _gated_bwd(how: tuple[str, str], residuals: Any, cotangents: tuple[Array, Array, Array]) -> tuple[Any, ...]:
    (dx,), dweights, dloras, _, _ = _project_bwd((_identity, (0.0, 0.0)), residuals, cotangents[:2])
    return dx, dweights, dloras


_gated.defvjp(_gated_fwd, _gated_bwd)


def _down(rates: Rates, x: Array, loras: Loras, keys: Any) -> dict[int, Array]:
    """u_i = A_i drop_i(x) [N, R_i] of each adapted Linear; the undropped ones as one product."""
    plain = {i: lora for i, lora in enumerate(loras) if lora is not None and not rates[i]}
    us = dict(zip(plain, _split(contract_last(x, _stacked_a(plain, x.dtype)), plain, axis=1), strict=True)) if plain else {}
    for i, lora in enumerate(loras):
        if lora is not None and rates[i]:
            us[i] = contract_last(x * _keep(keys[i], rates[i], x), lora.a.astype(x.dtype))
    return us


def _scaled(lora: LoRA, dtype: Any) -> Array:
    """s·B, scaled in fp32 and rounded once."""
    return (lora.scale * lora.b).astype(dtype)


def _stacked_a(loras: Mapping[int, LoRA], dtype: Any) -> Array:
    return jnp.concatenate([lora.a for lora in loras.values()]).astype(dtype)


def _split(stacked: Array, loras: Mapping[int, LoRA], *, axis: int) -> list[Array]:
    return jnp.split(stacked, list(itertools.accumulate(lora.rank for lora in loras.values()))[:-1], axis=axis)


def _pair_gradient(lora: LoRA, da: Array, db: Array) -> LoRA:
    """Of the sums over the rows da = duᵀ x and db = dyᵀ u."""
    return LoRA(da.astype(lora.a.dtype), (lora.scale * db).astype(lora.b.dtype), jnp.zeros_like(lora.scale))


def _keep(key: PRNGKeyArray, rate: float, x: Array) -> Array:
    """1 / (1 - rate) where an element is kept, else 0."""
    return jax.random.bernoulli(key, 1 - rate, x.shape).astype(x.dtype) / (1 - rate)
