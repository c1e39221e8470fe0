"""The one entry to 4-bit weights in e4m3, its reference, and its record."""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._kernel import Case, Kernel
from pallas_kernels.float8_rows import E4M3
from pallas_kernels.float8_transposed import KERNEL as TRANSPOSED
from pallas_kernels.float8_weight import triton, xla
from pallas_kernels.packed import Packed, reference_decode

_BACKENDS = {"triton": triton, "xla": xla}


def float8_weight(weight: Packed, scale: Float[Array, ""], *, backend: str = "auto") -> Float[Array, "O columns"]:
    """e4m3(w / scale) [O, I'] of a weight [O, I]; columns past I, where storage pads it to I', are zeros.

    What products of rows in e4m3 contract; `float8_transposed` is what those with a gradient do. A code times its group's scale is rounded
    once. On a GPU a kernel rounds the 16 numbers of each group, of which its codes pick theirs, and finds the codes in the stack that they
    are a part of.

    >>> import jax.numpy as jnp
    >>> w = Packed(jnp.full((1, 32), 0x21, jnp.uint8), jnp.ones((1, 1)), None, 64)
    >>> float8_weight(w, jnp.float32(0.5))[:, :2].tolist()
    [[2.0, 4.0]]

    Raises:
      ValueError: the scale is no number, or nobody knows the backend.
      NotImplementedError: the named backend cannot run this call; the text says why.
    """
    if scale.shape != ():
        raise ValueError(f"expected one scale for the weight, got {scale.shape}")
    return _BACKENDS[KERNEL.choose(backend, weight, scale)].decoded(weight, scale)


def reference(weight: Packed, scale: Array) -> Array:
    """The arguments and result of `float8_weight`, by the definition; computed in fp32."""
    weight = weight.alone()
    padding = 2 * weight.codes.shape[1] - weight.width
    return jnp.pad(reference_decode(weight, jnp.float32) / scale, ((0, 0), (0, padding))).astype(E4M3)


def _refuses(backend: str, weight: Any, scale: Any) -> str | None:
    """Of arrays, or of their shapes and dtypes."""
    return _BACKENDS[backend].refuses(weight)


def _case(dtype: Any, *, transposed: str) -> Case:
    """The last weight of a case of `float8_transposed`."""
    arrays = TRANSPOSED.cases[transposed](dtype).arrays
    return Case(arrays={"weight": arrays["weights"][-1], "scale": arrays["scale"]}, static={}, wrt=())


KERNEL = Kernel(
    name="float8_weight",
    reference=reference,
    backends={name: functools.partial(float8_weight, backend=name) for name in _BACKENDS},
    refuses=_refuses,
    cases={name: functools.partial(_case, transposed=name) for name in ("int4", "nf4", "ragged", "three_of_stacks")},
    # As of `float8_transposed`.
    tolerance=TRANSPOSED.tolerance,
)
