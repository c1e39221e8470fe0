"""Rotary position embeddings: frequencies, tables, rotation."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora.typing import Array, Float, Int

type Table = tuple[Array, Array]


def frequencies(head_dim: int, rope: Mapping[str, Any]) -> np.ndarray:
    """Inverse frequencies [C/2] in fp32, scaled as ``rope['rope_type']`` says; formulas as in transformers' modeling_rope_utils.

    Kinds: "default" θ^(-2j/C); "linear" (f / factor); "llama3" (long wavelengths divided by the factor, a smooth band between).

    >>> frequencies(4, {"rope_type": "default", "rope_theta": 100.0}).tolist()
    [1.0, 0.10000000149011612]

    Raises:
      NotImplementedError: another kind of scaling.
    """
    theta, kind = rope["rope_theta"], rope.get("rope_type", "default")
    base = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if kind in ("default", "mrope"):
        return base.astype(np.float32)
    if kind == "linear":
        return (base / rope["factor"]).astype(np.float32)
    if kind == "llama3":
        return _llama3(base, rope)
    raise NotImplementedError(f"rope_type {kind!r} is not modelled; the ones that are: default, mrope, linear, llama3")


def _llama3(base: np.ndarray, rope: Mapping[str, Any]) -> np.ndarray:
    original = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    wavelength = 2 * math.pi / base
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return ((1 - smooth) * base / factor + smooth * base).astype(np.float32)


def table(positions: Int[Array, "*B S"], inverse: np.ndarray, dtype: Any) -> tuple[Float[Array, "*B S C"], Float[Array, "*B S C"]]:
    """(cos, sin) of position · frequency, each half of C alike; computed in fp32, cast to ``dtype``."""
    return _both_halves(positions.astype(jnp.float32)[..., None] * jnp.asarray(inverse).reshape((1,) * positions.ndim + (-1,)), dtype)


def mrope_table(positions: Int[Array, "3 B S"], inverse: np.ndarray, sections: tuple[int, ...], dtype: Any) -> tuple[Array, Array]:
    """(cos, sin) [B, S, C] where frequency j follows the time, height or width position whose section it lies in (Qwen2-VL's chunks)."""
    which = np.repeat(np.arange(3), sections)
    chosen = jnp.moveaxis(positions, 0, -1).astype(jnp.float32)[..., which]  # [B, S, C/2]
    return _both_halves(chosen * jnp.asarray(inverse)[None, None], dtype)


def rotate(x: Float[Array, "B S H C"], rope: tuple[Float[Array, "B S C"], Float[Array, "B S C"]]) -> Float[Array, "B S H C"]:
    """x ∘ cos + rotate_half(x) ∘ sin, pairing channel j with j + C/2, in the tables' dtype, returned in x's."""
    cos, sin = (t[:, :, None, :] for t in rope)
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(cos.dtype) * cos + turned.astype(cos.dtype) * sin).astype(x.dtype)


def _both_halves(angles: Array, dtype: Any) -> tuple[Array, Array]:
    full = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(full).astype(dtype), jnp.sin(full).astype(dtype)
