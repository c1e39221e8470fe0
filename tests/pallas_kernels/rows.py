"""Arguments of attention."""

import jax.numpy as jnp
import numpy as np


def qkv(length, *, rows=1, heads=2, kv_heads=1, width=8, dtype=jnp.float32):
    draw = np.random.default_rng(0)
    shapes = [(rows, length, h, width) for h in (heads, kv_heads, kv_heads)]
    return [jnp.asarray(draw.standard_normal(shape), dtype) for shape in shapes]


def segments(*pairs):
    return tuple(jnp.asarray(x, jnp.int32)[None] for x in zip(*pairs, strict=True))
