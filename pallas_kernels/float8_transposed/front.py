"""The one entry to a 4-bit weight's transpose in e4m3, its reference, and its record."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import packed
from pallas_kernels._kernel import Case, Kernel
from pallas_kernels.float8_rows import E4M3
from pallas_kernels.float8_transposed import triton, xla
from pallas_kernels.packed import Packed, reference_decode

_BACKENDS = {"triton": triton, "xla": xla}


def float8_transposed(weight: Packed, scale: Float[Array, ""], *, backend: str = "auto") -> Float[Array, "columns O"]:
    """e4m3(w / scale)ᵀ [I', O] of a weight [O, I]; rows past I, where storage pads it to I', are zeros.

    What products with a gradient contract, since those in e4m3 want the contracted axis last in both operands. A code times its group's
    scale is rounded once. On a GPU one kernel turns tiles around; XLA writes the turned codes and reads them again.

    >>> import jax.numpy as jnp
    >>> w = Packed(jnp.full((1, 32), 0x21, jnp.uint8), jnp.ones((1, 1)), None, 64)
    >>> float8_transposed(w, jnp.float32(0.5))[:2].tolist()
    [[2.0], [4.0]]

    Raises:
      ValueError: the scale is no number, or nobody knows the backend.
      NotImplementedError: the named backend cannot run this call; the text says why.
    """
    if scale.shape != ():
        raise ValueError(f"expected one scale for the whole weight, got {scale.shape}")
    return _BACKENDS[KERNEL.choose(backend, weight, scale)].transposed(weight, scale)


def reference(weight: Packed, scale: Array) -> Array:
    """The arguments and result of `float8_transposed`, by the definition; computed in fp32."""
    w = reference_decode(weight, jnp.float32) / scale
    padding = 2 * weight.codes.shape[1] - weight.width
    return jnp.pad(w, ((0, 0), (0, padding))).T.astype(E4M3)


def _refuses(backend: str, weight: Any, scale: Any) -> str | None:
    """Of arrays, or of their shapes and dtypes."""
    return _BACKENDS[backend].refuses(weight)


def _case(dtype: Any, *, shape: tuple[int, int], form: str) -> Case:
    weight = packed.random(np.random.default_rng(0), shape, form, dtype)
    assert isinstance(weight, Packed)
    return Case(arrays={"weight": weight, "scale": jnp.float32(shape[1] ** -0.5 / 64)}, static={}, wrt=())


CASES = {
    "int4": functools.partial(_case, shape=(192, 256), form="int4"),
    "nf4": functools.partial(_case, shape=(128, 192), form="nf4"),
    "ragged": functools.partial(_case, shape=(70, 100), form="int4"),
}

KERNEL = Kernel(
    name="float8_transposed",
    reference=reference,
    backends={name: functools.partial(float8_transposed, backend=name) for name in _BACKENDS},
    refuses=_refuses,
    cases=CASES,
    # The order of two products may round a number beside the middle of two codes to the other one.
    tolerance={"float32": 1e-3, "bfloat16": 1e-3},
)
