"""The one Linear, and how Linears that share their input are multiplied together."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlora.nn.mlp_products import mlp_rows
from jaxlora.nn.pending import Pending
from jaxlora.nn.products import Activation, Inputs, gated_rows, identity, makes_gradient, makes_input, named, project_rows
from jaxlora.typing import Array, Float, PRNGKeyArray
from jaxlora.weights.base import AbstractWeight, abstract
from jaxlora.weights.dense import Dense
from jaxlora.weights.lora import LoRA
from pallas_kernels.functions import Function
from pallas_kernels.gated_gradients import KERNEL as GRADIENTS
from pallas_kernels.lora_swiglu import KERNEL as GATED
from pallas_kernels.plain_gradients import KERNEL as PLAIN_GRADIENTS

_MAKING = contextvars.ContextVar("making_inputs", default=False)


@contextlib.contextmanager
def making_inputs(making: bool) -> Iterator[None]:
    """Whether what is traced inside lets kernels make the norms and activations that Linears take, and the gradients of gateless MLPs; and
    whether the gradients by the outputs of one input are one product.

    For policies that keep some of what blocks make ("attention", "dots"). Where a block is recomputed whole the kernels would run twice;
    what is fetched from host memory begins to move too late there if fewer products are left to run.
    """
    token = _MAKING.set(making)
    try:
        yield
    finally:
        _MAKING.reset(token)


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

    def __call__(self, x: Float[Array, "*N I"] | Pending, key: PRNGKeyArray | None = None) -> Float[Array, "*N O"]:
        """A group of one."""
        return project((self,), x, None if key is None else (key,))[0]


def project(
    linears: Sequence[Linear], x: Float[Array, "*N I"] | Pending, keys: Sequence[PRNGKeyArray | None] | None = None
) -> tuple[Float[Array, "*N O"], ...]:
    """y_i = W_i x + s_i·B_i·A_i·drop_i(x) + bias_i for Linears that share their input.

    The products run in x's dtype with fp32 accumulation; the A of the group are one product. Saved for the backward: x, or what it is
    made of where it is pending and a kernel makes it, and the stored (packed) weights. dA and dB are returned in fp32. Dropout is applied
    where a Linear has a rate and ``keys`` are given (one a Linear; None where it has no rate); its mask is drawn again in the backward.
    """
    if isinstance(x, Pending):
        return _project_from(x.function, linears, x.inputs, keys, hollow=x.hollow)
    return _project_from(identity, linears, (x,), keys)


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
    linears: tuple[Linear, Linear], x: Float[Array, "*N I"] | Pending, activation: str, keys: Sequence[PRNGKeyArray | None]
) -> tuple[tuple[Float[Array, "*N F"], Float[Array, "*N F"]], Float[Array, "*N F"] | None]:
    """((e, g), h): the two projections of x and, where a kernel makes all three in one pass, h = act(e) ∘ g; else None.

    The kernel is `pallas_kernels.lora_swiglu`'s backend that was measured to be fastest here. h has no gradient: whoever uses it takes it
    for the value of act(e) ∘ g, and differentiates that.
    """
    first = x.inputs[0] if isinstance(x, Pending) else x
    backend = _gated_backend(linears, first.reshape(-1, first.shape[-1]), activation, keys)
    if backend is None:
        e, g = project(linears, x, keys)
        return (e, g), None
    x = x.value() if isinstance(x, Pending) else x
    rows = x.reshape(-1, x.shape[-1])
    weights, loras = tuple(_weight(linear) for linear in linears), tuple(linear.lora for linear in linears)
    e, g, h = (y.reshape(*x.shape[:-1], -1) for y in gated_rows((activation, backend), rows, weights, loras))
    return (named(e), named(g)), jax.lax.stop_gradient(h)


def project_mlp(
    linears: Sequence[Linear], x: Float[Array, "*N I"] | Pending, activation: str, keys: Sequence[PRNGKeyArray | None]
) -> Float[Array, "*N O"] | None:
    """down(act(gate x) ∘ up x) of (gate, up, down), or down(act(up x)) of (up, down), where a kernel makes the wide gradients.

    The kernels are `pallas_kernels.gated_gradients` and `pallas_kernels.plain_gradients`, which make the adapters' sums in the same pass.
    None where they cannot run or, without a gate, are not wanted (`making_inputs`), and where their pass would not be all: with dropout,
    where a Linear has no adapter, with biases of the projections before a gate, or without one where there is no gate.
    """
    *first, last = linears
    making = _MAKING.get()
    gated, loras = len(first) == 2, tuple(lora for linear in linears if (lora := linear.lora) is not None)
    drops = any(linear.lora_dropout and key is not None for linear, key in zip(linears, keys, strict=True))
    if drops or len(loras) < len(linears) or any((linear.bias is None) != gated for linear in first) or not (gated or making):
        return None
    act, inputs, hollow = (x.function, x.inputs, x.hollow) if isinstance(x, Pending) else (identity, (x,), None)
    rows, weights = tuple(v.reshape(-1, v.shape[-1]) for v in inputs), tuple(_weight(linear) for linear in linears)
    dtype = rows[0].dtype
    bias = None if gated else _bias(first[0], dtype)
    N, (F, _) = len(rows[0]), weights[0].shape
    shapes = (N, F), (1, F), (loras[-1].rank, F), *((N, lora.rank) for lora in loras)
    wide, row, a, *columns = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    kernel, arguments = (GRADIENTS, (wide, wide, wide, *columns, a)) if gated else (PLAIN_GRADIENTS, (wide, row, wide, *columns))
    if kernel.choose("auto", *arguments, activation=activation) == "xla":
        return None
    y = mlp_rows((act, activation, making), rows, hollow, bias, weights, loras)
    return (y if last.bias is None else y + _bias(last, y.dtype)).reshape(*inputs[0].shape[:-1], -1)


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
    act: Activation,
    linears: Sequence[Linear],
    inputs: Sequence[Array],
    keys: Any,
    value: Array | None = None,
    hollow: Array | None = None,
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
    ys = project_rows((act, rates, _MAKING.get()), rows, hollow, weights, loras, used, value)
    biased = (y if linear.bias is None else y + _bias(linear, y.dtype) for y, linear in zip(ys, linears, strict=True))
    return tuple(y.reshape(*leading, y.shape[-1]) for y in biased)


def _drop(linears: Sequence[Linear], keys: Mapping[str, PRNGKeyArray] | None) -> bool:
    """Whether an adapter drops some of its input here."""
    return bool(keys) and any(linear.lora_dropout for linear in linears)


def pends(function: Function, inputs: Inputs, linears: Sequence[Linear], keys: Mapping[str, PRNGKeyArray] | None) -> bool:
    """Whether these Linears take function(*inputs), a norm, pending: a kernel makes it for them, or its gradient of theirs."""
    weights, loras = tuple(_weight(linear) for linear in linears), tuple(linear.lora for linear in linears)
    how, shapes = (function, (0.0,), _MAKING.get()), _shapes_of_rows(inputs)
    return not _drop(linears, keys) and (makes_input(how, shapes, weights, loras) or makes_gradient(function, shapes, weights, loras))


def _shapes_of_rows(inputs: Sequence[Array]) -> tuple[Any, ...]:
    return tuple(jax.ShapeDtypeStruct((v.size // v.shape[-1], v.shape[-1]), v.dtype) for v in inputs)


def _bias(linear: Linear, dtype: Any) -> Float[Array, "1 O"]:
    assert linear.bias is not None
    return linear.bias.get_value().astype(dtype)[None]


def _weight(linear: Linear) -> AbstractWeight:
    if linear.weight is None:
        raise ValueError("this Linear is tied to the embedding: multiply by the embedding's table instead")
    return linear.weight.get_value()
