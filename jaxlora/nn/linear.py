"""The one Linear, and the one custom VJP through which every adapted product goes."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlora.typing import Array, Float, PRNGKeyArray
from jaxlora.weights.base import AbstractWeight, abstract, contract_last, outer
from jaxlora.weights.dense import Dense
from jaxlora.weights.lora import LoRA


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
    rows = x.reshape(-1, x.shape[-1])
    weights = tuple(_weight(linear) for linear in linears)
    loras = tuple(linear.lora for linear in linears)
    rates = tuple(
        linear.lora_dropout if keys is not None and lora is not None else 0.0 for linear, lora in zip(linears, loras, strict=True)
    )
    used = tuple(key if rate else None for rate, key in zip(rates, keys or (None,) * len(rates), strict=True))
    ys = _project(rates, rows, weights, loras, used)
    named = (checkpoint_name(y, "dot") for y in ys)
    biased = (
        y if linear.bias is None else y + linear.bias.get_value().astype(y.dtype)[None] for y, linear in zip(named, linears, strict=True)
    )
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in biased)


def _weight(linear: Linear) -> AbstractWeight:
    if linear.weight is None:
        raise ValueError("this Linear is tied to the embedding: multiply by the embedding's table instead")
    return linear.weight.get_value()


def _forward(
    rates: tuple[float, ...], x: Array, weights: tuple[AbstractWeight, ...], loras: tuple[LoRA | None, ...], keys: Any
) -> tuple[Array, ...]:
    return _ys(x, weights, loras, _down(rates, x, loras, keys))


_project = jax.custom_vjp(_forward, nondiff_argnums=(0,))


def _project_fwd(rates: tuple[float, ...], x: Array, weights: Any, loras: Any, keys: Any) -> tuple[tuple[Array, ...], Any]:
    # A few columns a Linear, for which the backward would read x once more.
    us = [None if u is None else checkpoint_name(u, "lora_u") for u in _down(rates, x, loras, keys)]
    return _ys(x, weights, loras, us), (x, weights, loras, keys, us)


def _ys(x: Array, weights: tuple[AbstractWeight, ...], loras: tuple[LoRA | None, ...], us: list[Array | None]) -> tuple[Array, ...]:
    """y_i = W_i x + s_i B_i u_i. All Linears get the same columns u, B_i being zero at the others', so that [x, u] is one array."""
    adapted = [u for u in us if u is not None]
    if not adapted:
        return tuple(w.matmul(x) for w in weights)
    columns = jnp.concatenate(adapted, axis=1)
    ys, at = [], 0
    for w, lora in zip(weights, loras, strict=True):
        if lora is None:
            ys.append(w.matmul(x))
            continue
        b = jnp.pad(_scaled(lora, x.dtype), ((0, 0), (at, columns.shape[1] - at - lora.rank)))
        ys.append(w.matmul(x, (columns, b)))
        at += lora.rank
    return tuple(ys)


def _project_bwd(rates: tuple[float, ...], residuals: Any, dys: tuple[Array, ...]) -> tuple[Any, ...]:
    x, weights, loras, keys, us = residuals
    dus = [None if lora is None else _up(dy, lora) for lora, dy in zip(loras, dys, strict=True)]
    plain = [i for i, lora in enumerate(loras) if lora is not None and not rates[i]]
    dx = None
    for i, (w, dy) in enumerate(zip(weights, dys, strict=True)):
        # The undropped A of the group enter dx as one product, fused with the first weight's.
        update = (jnp.concatenate([dus[j] for j in plain], -1), _stacked_a(loras, plain, x.dtype)) if plain and i == 0 else None
        part = w.matmul_t(dy, update)
        dx = part if dx is None else dx + part
    dloras: list[LoRA | None] = [None] * len(loras)
    das = _split(outer(jnp.concatenate([dus[j] for j in plain], -1), x), [loras[j].rank for j in plain], axis=0) if plain else []
    for j, da in zip(plain, das, strict=True):
        dloras[j] = _pair_gradient(loras[j], da, dys[j], us[j])
    for j, rate in enumerate(rates):
        if rate:
            kept = _keep(keys[j], rate, x)
            dx = dx + (dus[j] @ loras[j].a.astype(x.dtype)) * kept
            dloras[j] = _pair_gradient(loras[j], outer(dus[j], x * kept), dys[j], us[j])
    dweights = tuple(w.cotangent(x, dy) for w, dy in zip(weights, dys, strict=True))
    return dx, dweights, tuple(dloras), None


_project.defvjp(_project_fwd, _project_bwd)


def _down(rates: tuple[float, ...], x: Array, loras: tuple[LoRA | None, ...], keys: Any) -> list[Array | None]:
    """u_i = A_i drop_i(x) [N, R_i]; the undropped ones as one product."""
    us: list[Array | None] = [None] * len(loras)
    plain = [i for i, lora in enumerate(loras) if lora is not None and not rates[i]]
    if plain:
        ranks = [loras[i].rank for i in plain]  # pyright: ignore[reportOptionalMemberAccess]
        for i, u in zip(plain, _split(contract_last(x, _stacked_a(loras, plain, x.dtype)), ranks, axis=1), strict=True):
            us[i] = u
    for i, rate in enumerate(rates):
        if rate:
            us[i] = contract_last(x * _keep(keys[i], rate, x), loras[i].a.astype(x.dtype))  # pyright: ignore[reportOptionalMemberAccess]
    return us


def _up(dy: Array, lora: LoRA) -> Array:
    """s·dy B [N, R]."""
    return dy @ _scaled(lora, dy.dtype)


def _scaled(lora: LoRA, dtype: Any) -> Array:
    """s·B, scaled in fp32 and rounded once."""
    return (lora.scale * lora.b).astype(dtype)


def _stacked_a(loras: tuple[LoRA | None, ...], which: list[int], dtype: Any) -> Array:
    return jnp.concatenate([loras[i].a for i in which]).astype(dtype)  # pyright: ignore[reportOptionalMemberAccess]


def _split(stacked: Array, sizes: list[int], *, axis: int) -> list[Array]:
    return jnp.split(stacked, list(itertools.accumulate(sizes))[:-1], axis=axis)


def _pair_gradient(lora: LoRA, da: Array, dy: Array, u: Array) -> LoRA:
    return LoRA(da.astype(lora.a.dtype), (lora.scale * outer(dy, u)).astype(lora.b.dtype), jnp.zeros_like(lora.scale))


def _keep(key: PRNGKeyArray, rate: float, x: Array) -> Array:
    """1 / (1 - rate) where an element is kept, else 0."""
    return jax.random.bernoulli(key, 1 - rate, x.shape).astype(x.dtype) / (1 - rate)
