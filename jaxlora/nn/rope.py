"""Rotary position embeddings: frequencies, tables, rotation."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conversion.hf_config import Rope
from jaxlora.typing import Array, Float, Int

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")

type Table = tuple[Array, Array]


def frequencies(head_dim: int, rope: Rope) -> np.ndarray:
    """Inverse frequencies [C/2] in fp32, scaled as ``rope.kind`` says; formulas as in transformers' modeling_rope_utils.

    "default": θ^(-2j/C); "linear": that / factor; "llama3": long wavelengths divided by the factor, a smooth band between; "yarn"
    (Peng et al. 2023, arXiv:2309.00071): the same with a linear band, and `attention_factor`; "dynamic": the default ones, which
    `dynamic_frequencies` stretches for documents longer than what was trained.

    >>> frequencies(4, Rope(theta=100.0)).tolist()
    [1.0, 0.10000000149011612]

    Raises:
      NotImplementedError: another kind of scaling, or one that does not turn every channel.
    """
    if rope.kind not in KINDS or rope.partial_rotary_factor != 1 or (rope.mrope_interleaved and rope.mrope_section is None):
        known = f"the kinds that are: {', '.join(KINDS)}, on all channels, interleaved only with an mrope_section"
        raise NotImplementedError(f"{rope} is not modelled; {known}")
    base = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if rope.kind == "linear":
        base = base / rope.factor
    if rope.kind == "llama3":
        base = _llama3(base, rope)
    if rope.kind == "yarn":
        base = _yarn(base, rope)
    return base.astype(np.float32)


def attention_factor(rope: Rope) -> float:
    """What YaRN multiplies cos and sin by, so that a longer context keeps its entropy; 1 for the other kinds.

    >>> round(attention_factor(Rope(theta=1e4, kind="yarn", factor=32.0, original_max_positions=4096)), 4)
    1.3466
    """
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def dynamic_frequencies(head_dim: int, rope: Rope, lengths: Int[Array, "*B S"]) -> Float[Array, "*B S c"]:
    """Inverse frequencies for tokens of documents of ``lengths`` L > L0: θ' = θ ((factor L / L0) - (factor - 1))^(C / (C - 2)).

    A document has the same frequencies whatever is packed or padded beside it. (transformers takes the longest row of a batch.)
    """
    assert rope.original_max_positions
    trained = rope.original_max_positions
    ratio = jnp.maximum(lengths, trained).astype(jnp.float32) / trained
    theta = rope.theta * (rope.factor * ratio - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
    exponents = (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim).reshape((1,) * lengths.ndim + (-1,))
    return theta[..., None] ** -exponents


def document_lengths(positions: Int[Array, "*B S"]) -> Int[Array, "*B S"]:
    """The last position + 1 of the run of successive positions that each token is in.

    >>> document_lengths(jnp.array([[0, 1, 2, 0, 1, 0]])).tolist()
    [[3, 3, 3, 2, 2, 1]]
    """
    following = jnp.concatenate([positions[..., 1:], jnp.full_like(positions[..., :1], -1)], axis=-1)
    columns = jnp.broadcast_to(jnp.arange(positions.shape[-1]).reshape((1,) * (positions.ndim - 1) + (-1,)), positions.shape)
    ends = jax.lax.cummin(jnp.where(following == positions + 1, positions.shape[-1], columns), axis=positions.ndim - 1, reverse=True)
    return jnp.take_along_axis(positions, ends, axis=-1) + 1


def lengthened(rope: Rope, trained: int, wanted: int) -> Rope:
    """The rotary positions for sequences of ``wanted`` tokens in a model trained on ``trained``.

    Up to ``trained`` nothing changes. Beyond, llama-3 and dynamic scaling are kept (they reach further by themselves), default positions
    are scaled linearly by wanted / trained, and the factors of linear and yarn grow by that much.

    >>> lengthened(Rope(theta=1e4), 2048, 8192).factor
    4.0

    Raises:
      NotImplementedError: for another kind.
    """
    if wanted <= trained or rope.kind in ("llama3", "dynamic"):
        return rope
    if rope.kind not in KINDS or rope.mrope_section is not None:
        raise NotImplementedError(
            f"max_seq_length={wanted} is more than the model's {trained}, and {rope.kind!r} positions cannot be lengthened"
        )
    kind = "yarn" if rope.kind == "yarn" else "linear"
    return dataclasses.replace(rope, kind=kind, factor=rope.factor * wanted / trained)


def _llama3(base: np.ndarray, rope: Rope) -> np.ndarray:
    assert rope.original_max_positions and rope.low_freq_factor and rope.high_freq_factor
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / base
    smooth = np.clip((rope.original_max_positions / wavelength - low) / (high - low), 0, 1)
    return (1 - smooth) * base / rope.factor + smooth * base


def _yarn(base: np.ndarray, rope: Rope) -> np.ndarray:
    assert rope.original_max_positions
    dim, trained = 2 * len(base), rope.original_max_positions

    def channel(turns: float) -> float:
        """Where a wave turns that often within what was trained."""
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(len(base), dtype=np.float32) - low) / (high - low or 1e-3), 0, 1)
    return base / rope.factor * ramp + base * (1 - ramp)


def text_table(positions: Int[Array, "*kinds B S"], head_dim: int, rope: Rope, dtype: Any) -> Table:
    """(cos, sin) [B, S, C] of a text model's positions, [B, S] or [3, B, S] (M-RoPE)."""
    inverse, factor = frequencies(head_dim, rope), attention_factor(rope)
    if rope.mrope_section is not None:
        if rope.kind in ("dynamic", "yarn"):
            raise NotImplementedError(f"{rope.kind!r} scaling of M-RoPE is not modelled")
        return mrope_table(positions, inverse, rope.mrope_section, dtype, interleaved=rope.mrope_interleaved)
    if rope.kind == "dynamic":
        return table(positions, dynamic_frequencies(head_dim, rope, document_lengths(positions)), dtype)
    return table(positions, inverse, dtype, factor=factor)


def table(
    positions: Int[Array, "*B S"], inverse: Float[Any, "*#B #S c"] | Float[np.ndarray, " c"], dtype: Any, *, factor: float = 1.0
) -> tuple[Float[Array, "*B S C"], Float[Array, "*B S C"]]:
    """(cos, sin) of position · frequency, each half of C alike, times ``factor``; computed in fp32, cast to ``dtype``."""
    inverse = jnp.asarray(inverse)
    inverse = inverse.reshape((1,) * positions.ndim + (-1,)) if inverse.ndim == 1 else inverse
    return _both_halves(positions.astype(jnp.float32)[..., None] * inverse, dtype, factor)


def mrope_table(
    positions: Int[Array, "3 B S"], inverse: np.ndarray, sections: tuple[int, ...], dtype: Any, *, interleaved: bool = False
) -> tuple[Array, Array]:
    """(cos, sin) [B, S, C] where frequency j follows the time, height or width position (Qwen-VL).

    In chunks (Qwen2-VL) it is the one whose section j lies in. Interleaved (Qwen3-VL), height has j = 1, 4, 7, … and width 2, 5, 8, …, as
    many as their sections say, and time has all others.
    """
    which = np.repeat(np.arange(3), sections)
    if interleaved:
        j = np.arange(len(which))
        which = np.where(j < 3 * np.asarray(sections)[j % 3], j % 3, 0)
    chosen = jnp.moveaxis(positions, 0, -1).astype(jnp.float32)[..., which]  # [B, S, C/2]
    return _both_halves(chosen * jnp.asarray(inverse)[None, None], dtype)


def axial_table(
    positions: Int[Array, "P W 2"], inverse: Float[np.ndarray, " c"] | Float[np.ndarray, "2 c"], dtype: Any
) -> tuple[Float[Array, "P W C"], Float[Array, "P W C"]]:
    """(cos, sin) of a vision tower's patches: the first quarter of C follows the row, the second the column, the other half is alike.

    ``inverse`` are the frequencies of both, or those of rows and those of columns.

    >>> axial_table(jnp.array([[[0, 1]]]), np.array([1.0], np.float32), jnp.float32)[1].round(2).tolist()
    [[[0.0, 0.8399999737739563, 0.0, 0.8399999737739563]]]
    """
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(np.atleast_2d(inverse))[None, None]  # [P, W, 2, C/4]
    return _both_halves(angles.reshape(*positions.shape[:2], -1), dtype)


def rotate(x: Float[Array, "B S H C"], rope: tuple[Float[Array, "B S C"], Float[Array, "B S C"]]) -> Float[Array, "B S H C"]:
    """x ∘ cos + rotate_half(x) ∘ sin, pairing channel j with j + C/2, in the tables' dtype, returned in x's."""
    cos, sin = (t.reshape(*t.shape[:2], 1, 2, -1) for t in rope)
    halves = x.reshape(*x.shape[:3], 2, -1).astype(cos.dtype)
    signs = jnp.array([-1, 1], cos.dtype).reshape(1, 1, 1, 2, 1)
    # Reversed, not put together from parts: XLA then writes the gradient where it is multiplied.
    return (halves * cos + jnp.flip(halves, axis=3) * (signs * sin)).reshape(x.shape).astype(x.dtype)


def _both_halves(angles: Array, dtype: Any, factor: float = 1.0) -> tuple[Array, Array]:
    full = jnp.concatenate([angles, angles], axis=-1)
    return (factor * jnp.cos(full)).astype(dtype), (factor * jnp.sin(full)).astype(dtype)
