"""Rotary position embeddings: frequencies, tables, rotation."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from conversion.hf_config import Rope
from jaxlora.typing import Array, Float, Int

KINDS = ("default", "linear", "llama3")

type Table = tuple[Array, Array]


def frequencies(head_dim: int, rope: Rope) -> np.ndarray:
    """Inverse frequencies [C/2] in fp32, scaled as ``rope.kind`` says; formulas as in transformers' modeling_rope_utils.

    "default": θ^(-2j/C); "linear": that / factor; "llama3": long wavelengths divided by the factor, a smooth band between.

    >>> frequencies(4, Rope(theta=100.0)).tolist()
    [1.0, 0.10000000149011612]

    Raises:
      NotImplementedError: another kind of scaling, or one that does not turn every channel.
    """
    if rope.kind not in KINDS or rope.partial_rotary_factor != 1 or rope.mrope_interleaved:
        raise NotImplementedError(f"{rope} is not modelled; the kinds that are: {', '.join(KINDS)}, not interleaved, on all channels")
    base = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if rope.kind == "linear":
        base = base / rope.factor
    if rope.kind == "llama3":
        base = _llama3(base, rope)
    return base.astype(np.float32)


def lengthened(rope: Rope, trained: int, wanted: int) -> Rope:
    """The rotary positions for sequences of ``wanted`` tokens in a model trained on ``trained``.

    Up to ``trained`` nothing changes. Beyond, llama-3 scaling is kept (it reaches further by itself), default positions are scaled
    linearly by wanted / trained, and linear ones by that much more.

    >>> lengthened(Rope(theta=1e4), 2048, 8192).factor
    4.0

    Raises:
      NotImplementedError: for another kind.
    """
    if wanted <= trained or rope.kind == "llama3":
        return rope
    if rope.kind not in ("default", "linear") or rope.mrope_section is not None:
        raise NotImplementedError(
            f"max_seq_length={wanted} is more than the model's {trained}, and {rope.kind!r} positions cannot be lengthened"
        )
    return dataclasses.replace(rope, kind="linear", factor=rope.factor * wanted / trained)


def _llama3(base: np.ndarray, rope: Rope) -> np.ndarray:
    assert rope.original_max_positions and rope.low_freq_factor and rope.high_freq_factor
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / base
    smooth = np.clip((rope.original_max_positions / wavelength - low) / (high - low), 0, 1)
    return (1 - smooth) * base / rope.factor + smooth * base


def table(positions: Int[Array, "*B S"], inverse: np.ndarray, dtype: Any) -> tuple[Float[Array, "*B S C"], Float[Array, "*B S C"]]:
    """(cos, sin) of position · frequency, each half of C alike; computed in fp32, cast to ``dtype``."""
    return _both_halves(positions.astype(jnp.float32)[..., None] * jnp.asarray(inverse).reshape((1,) * positions.ndim + (-1,)), dtype)


def mrope_table(positions: Int[Array, "3 B S"], inverse: np.ndarray, sections: tuple[int, ...], dtype: Any) -> tuple[Array, Array]:
    """(cos, sin) [B, S, C] where frequency j follows the time, height or width position whose section it lies in (Qwen2-VL's chunks)."""
    which = np.repeat(np.arange(3), sections)
    chosen = jnp.moveaxis(positions, 0, -1).astype(jnp.float32)[..., which]  # [B, S, C/2]
    return _both_halves(chosen * jnp.asarray(inverse)[None, None], dtype)


def axial_table(positions: Int[Array, "P W 2"], inverse: np.ndarray, dtype: Any) -> tuple[Float[Array, "P W C"], Float[Array, "P W C"]]:
    """(cos, sin) of a vision tower's patches: the first quarter of C follows the row, the second the column, the other half is alike.

    >>> axial_table(jnp.array([[[0, 1]]]), np.array([1.0], np.float32), jnp.float32)[1].round(2).tolist()
    [[[0.0, 0.8399999737739563, 0.0, 0.8399999737739563]]]
    """
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(inverse)[None, None, None]  # [P, W, 2, C/4]
    return _both_halves(angles.reshape(*positions.shape[:2], -1), dtype)


def rotate(x: Float[Array, "B S H C"], rope: tuple[Float[Array, "B S C"], Float[Array, "B S C"]]) -> Float[Array, "B S H C"]:
    """x ∘ cos + rotate_half(x) ∘ sin, pairing channel j with j + C/2, in the tables' dtype, returned in x's."""
    cos, sin = (t[:, :, None, :] for t in rope)
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(cos.dtype) * cos + turned.astype(cos.dtype) * sin).astype(x.dtype)


def _both_halves(angles: Array, dtype: Any) -> tuple[Array, Array]:
    full = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(full).astype(dtype), jnp.sin(full).astype(dtype)
