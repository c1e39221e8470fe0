"""The one entry to the input of adapted Linears with their columns, its reference, and its record."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels._kernel import Case, Kernel
from pallas_kernels.functions import PLAIN, Function
from pallas_kernels.lora_input import triton, xla
from pallas_kernels.lora_swiglu.activations import ACTIVATIONS

_BACKENDS = {"triton": triton, "xla": xla}


def lora_input(
    inputs: Sequence[Float[Array, "_ F"]],
    a: Float[Array, "R F"],
    *,
    function: Function,
    padding: int | None = 0,
    backend: str = "auto",
) -> tuple[Float[Array, "N C"], Float[Array, "N R"], Float[Array, "N S"] | None]:
    """([h, u, 0], u, statistics) of h = function(*inputs) [N, F] and u = h @ aᵀ: what Linears with the adapters a take, in one array.

    y = h Wᵀ + u Bᵀ is then [h, u] @ [W, B]ᵀ, one product that reads h once and adds the adapters' part in fp32; so many columns of zeros as
    ``padding`` says are behind it, and without one h comes alone. h is rounded to the
    dtype of the inputs before it is multiplied by a; u is accumulated in fp32 and rounded once. On a GPU one kernel reads the inputs and
    writes both, so that h is neither read again for u nor copied beside it. ``statistics`` are the function's, for its backward. There is
    no gradient: whoever uses it differentiates ``function``.

    >>> import jax.numpy as jnp
    >>> both, u, statistics = lora_input((4 * jnp.ones((1, 2)), jnp.ones((1, 2))), jnp.ones((1, 2)), function=Function("rms_norm"))
    >>> both.tolist(), u.tolist(), statistics.tolist()
    ([[1.0, 1.0, 2.0]], [[2.0]], [[0.25]])

    Raises:
      ValueError: shapes or dtypes disagree, or nobody knows the activation or the backend.
      NotImplementedError: the named backend cannot run this call; the text says why.
    """
    _check(inputs, a, function)
    return _BACKENDS[KERNEL.choose(backend, inputs, a, function=function, padding=padding)].columns(function, inputs, a, padding)


def reference(inputs: Sequence[Array], a: Array, *, function: Function, padding: int | None = 0) -> tuple[Array, Array, Array | None]:
    """The arguments and results of `lora_input`, computed in fp32."""
    first, *others = (x.astype(jnp.float32) for x in inputs)
    statistics = []
    match function.form:
        case "rms_norm":
            statistics = [jnp.mean(first**2, axis=1) + function.eps]
            h = others[0] * first / jnp.sqrt(statistics[0])[:, None]
        case "layer_norm":
            statistics = [jnp.var(first, axis=1) + function.eps, jnp.mean(first, axis=1)]
            h = others[0] * jax.nn.standardize(first, axis=1, epsilon=function.eps) + others[1]
        case "plain":
            h = PLAIN[function.activation](first + others[0])
        case "gated":
            h = ACTIVATIONS[function.activation](first) * others[0]
    u = h @ a.astype(jnp.float32).T
    both = h if padding is None else jnp.pad(jnp.concatenate([h, u], axis=1), ((0, 0), (0, padding)))
    made = both.astype(a.dtype), u.astype(a.dtype)
    return *made, jnp.stack([statistics[0] ** -0.5, *statistics[1:]], axis=1) if statistics else None


def _check(inputs: Sequence[Array], a: Array, function: Function) -> None:
    wide, rows = function.inputs
    N, F = inputs[0].shape
    expected, got = [(N, F)] * wide + [(1, F)] * rows, [x.shape for x in inputs]
    faults = []
    if got != expected:
        faults.append(f"expected inputs {expected} for {function.form}, got {got}")
    if a.ndim != 2 or a.shape[1] != F:
        faults.append(f"expected a [R, {F}], got {list(a.shape)}")
    dtypes = {str(x.dtype) for x in (*inputs[:wide], a)}
    if len(dtypes) > 1:
        faults.append(f"expected one dtype of all but weights and biases, got {', '.join(sorted(dtypes))}")
    known = {"plain": PLAIN, "gated": ACTIVATIONS}.get(function.form)
    if known is not None and function.activation not in known:
        faults.append(f"the activation of {function.form} must be one of {', '.join(known)}, got {function.activation!r}")
    if faults:
        raise ValueError("; ".join(faults))


def _refuses(backend: str, inputs: Any, a: Any, *, function: Function, padding: int | None = 0) -> str | None:
    """Of arrays, or of their shapes and dtypes."""
    return _BACKENDS[backend].refuses(function, inputs[0], a.shape[0])


def _case(dtype: Any, *, rows: int, columns: int, rank: int, function: Function, weight: Any = None, padding: int | None = 0) -> Case:
    draw = np.random.default_rng(0)
    wide, narrow = function.inputs
    inputs = [jnp.asarray(draw.standard_normal((rows, columns)) + 0.5, dtype) for _ in range(wide)]
    inputs += [jnp.asarray(draw.standard_normal((1, columns)), weight or dtype) for _ in range(narrow)]
    a = jnp.asarray(draw.standard_normal((rank, columns)), dtype)
    return Case(arrays={"inputs": tuple(inputs), "a": a}, static={"function": function, "padding": padding}, wrt=())


_RMS, _LAYER = Function("rms_norm", eps=1e-5), Function("layer_norm", eps=1e-6)
CASES = {
    "rms_norm": functools.partial(_case, rows=64, columns=512, rank=32, function=_RMS),
    "rms_norm_by_fp32": functools.partial(_case, rows=64, columns=256, rank=16, function=_RMS, weight=jnp.float32),
    "layer_norm": functools.partial(_case, rows=64, columns=320, rank=16, function=_LAYER),
    "silu": functools.partial(_case, rows=64, columns=512, rank=16, function=Function("gated", "silu")),
    "gelu_tanh_gated": functools.partial(_case, rows=32, columns=256, rank=16, function=Function("gated", "gelu_tanh")),
    "gelu": functools.partial(_case, rows=32, columns=256, rank=16, function=Function("plain", "gelu")),
    "gelu_tanh": functools.partial(_case, rows=32, columns=256, rank=16, function=Function("plain", "gelu_tanh")),
    "quick_gelu": functools.partial(_case, rows=64, columns=256, rank=16, function=Function("plain", "quick_gelu")),
    "norm_alone": functools.partial(_case, rows=64, columns=512, rank=16, function=_RMS, padding=None),
    "padded_norm": functools.partial(_case, rows=64, columns=320, rank=80, function=_LAYER, padding=48),
    "padded_gated": functools.partial(_case, rows=64, columns=512, rank=16, function=Function("gated", "silu"), padding=48),
    "plain_alone": functools.partial(_case, rows=37, columns=75, rank=5, function=Function("plain", "gelu"), padding=None),
    "ragged_norm": functools.partial(_case, rows=37, columns=75, rank=5, function=_LAYER),
    "ragged_rms": functools.partial(_case, rows=19, columns=300, rank=20, function=_RMS),
    "ragged_gated": functools.partial(_case, rows=37, columns=275, rank=48, function=Function("gated", "silu")),
}

KERNEL = Kernel(
    name="lora_input",
    reference=reference,
    backends={name: functools.partial(lora_input, backend=name) for name in _BACKENDS},
    refuses=_refuses,
    cases=CASES,
    # 16-bit: what is normed or activated is rounded before it multiplies.
    tolerance={"float32": 1e-5, "bfloat16": 1e-2},
)
