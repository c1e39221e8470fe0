"""The one entry to 4-bit weights' transposes in e4m3, its reference, and its record."""

import dataclasses
import functools
from collections.abc import Sequence
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


def float8_transposed(weights: Sequence[Packed], scale: Float[Array, ""], *, backend: str = "auto") -> Float[Array, "columns O"]:
    """e4m3(w / scale)ᵀ [I', O] of weights [O_i, I] on top of each other; rows past I, where storage pads it to I', are zeros.

    What products with a gradient contract, since those in e4m3 want the contracted axis last in both operands. A code times its group's
    scale is rounded once. On a GPU one kernel turns tiles around, and finds the codes in the stacks that they are a part of; XLA copies
    them, writes the turned codes and reads them again.

    >>> import jax.numpy as jnp
    >>> w = Packed(jnp.full((1, 32), 0x21, jnp.uint8), jnp.ones((1, 1)), None, 64)
    >>> float8_transposed([w], jnp.float32(0.5))[:2].tolist()
    [[2.0], [4.0]]

    Raises:
      ValueError: the scale is no number, the weights have other widths, or nobody knows the backend.
      NotImplementedError: the named backend cannot run this call; the text says why.
    """
    if scale.shape != ():
        raise ValueError(f"expected one scale for all weights, got {scale.shape}")
    if len({weight.width for weight in weights}) != 1:
        raise ValueError(f"expected weights of one width, got {', '.join(str(weight.shape) for weight in weights)}")
    return _BACKENDS[KERNEL.choose(backend, weights, scale)].transposed(weights, scale)


def reference(weights: Sequence[Packed], scale: Array) -> Array:
    """The arguments and result of `float8_transposed`, by the definition; computed in fp32."""
    alone = [weight.alone() for weight in weights]
    w = jnp.concatenate([reference_decode(weight, jnp.float32) for weight in alone]) / scale
    padding = 2 * alone[0].codes.shape[1] - alone[0].width
    return jnp.pad(w, ((0, 0), (0, padding))).T.astype(E4M3)


def _refuses(backend: str, weights: Any, scale: Any) -> str | None:
    """Of arrays, or of their shapes and dtypes."""
    return _BACKENDS[backend].refuses(weights)


def _case(dtype: Any, *, rows: Sequence[int], width: int, form: str, layer: int | None = None) -> Case:
    draw, weights = np.random.default_rng(0), []
    for count in rows:
        weight = packed.random(draw, (count, width), form, dtype)
        assert isinstance(weight, Packed)
        if layer is not None:
            others = [jnp.asarray(draw.integers(0, 256, weight.codes.shape, dtype="uint8")) for _ in range(layer)]
            weight = dataclasses.replace(weight, codes=jnp.stack([*others, weight.codes]), layer=jnp.int32(layer))
        weights.append(weight)
    return Case(arrays={"weights": weights, "scale": jnp.float32(width**-0.5 / 64)}, static={}, wrt=())


CASES = {
    "int4": functools.partial(_case, rows=(192,), width=256, form="int4"),
    "nf4": functools.partial(_case, rows=(128,), width=192, form="nf4"),
    "ragged": functools.partial(_case, rows=(68,), width=100, form="int4"),
    "three_of_stacks": functools.partial(_case, rows=(128, 36, 68), width=192, form="int4", layer=2),
    "two_nf4": functools.partial(_case, rows=(64, 100), width=128, form="nf4"),
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
