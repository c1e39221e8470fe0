"""Feed-forward blocks."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlora.nn.linear import Linear, project
from jaxlora.typing import Array, Float, PRNGKeyArray


class SwiGLU(nnx.Module):
    """down(silu(gate x) ∘ up x)."""

    def __init__(self, features: int, hidden: int, *, bias: bool = False, dtype: Any = jnp.bfloat16):
        self.gate_proj = Linear(features, hidden, bias=bias, dtype=dtype)
        self.up_proj = Linear(features, hidden, bias=bias, dtype=dtype)
        self.down_proj = Linear(hidden, features, bias=bias, dtype=dtype)

    def __call__(self, x: Float[Array, "*N D"], keys: dict[str, PRNGKeyArray] | None = None) -> Float[Array, "*N D"]:
        """``keys``: a dropout key for each Linear that drops, by its name."""
        h = swiglu(self.gate_proj, self.up_proj, x, keys)
        return self.down_proj(h, None if keys is None else keys.get("down_proj"))


class PlainMLP(nnx.Module):
    """fc2(act(fc1 x)), with biases; ``activation`` is computed in fp32 and rounded once."""

    def __init__(self, features: int, hidden: int, *, activation: Callable[[Array], Array], dtype: Any = jnp.bfloat16):
        self.fc1 = Linear(features, hidden, bias=True, dtype=dtype)
        self.fc2 = Linear(hidden, features, bias=True, dtype=dtype)
        self.activation = activation

    def __call__(self, x: Float[Array, "*N D"], keys: Mapping[str, PRNGKeyArray] | None = None) -> Float[Array, "*N D"]:
        """``keys``: a dropout key for each Linear that drops, by its name."""
        keys = keys or {}
        h = self.fc1(x, keys.get("fc1"))
        return self.fc2(self.activation(h.astype(jnp.float32)).astype(h.dtype), keys.get("fc2"))


def quick_gelu(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """x · sigmoid(1.702 x) (Hendrycks & Gimpel 2016, arXiv:1606.08415).

    >>> quick_gelu(jnp.array([0.0, 1.0])).round(3).tolist()
    [0.0, 0.8460000157356262]
    """
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """x · Φ(x) with the normal distribution's exact Φ.

    >>> gelu(jnp.array([0.0, 1.0])).round(3).tolist()
    [0.0, 0.8410000205039978]
    """
    return jax.nn.gelu(x, approximate=False)


def swiglu(gate: Linear, up: Linear, x: Float[Array, "*N D"], keys: dict[str, PRNGKeyArray] | None = None) -> Float[Array, "*N F"]:
    """silu(gate x) ∘ up x with one shared x; silu is computed in fp32 and rounded before it multiplies, as transformers does."""
    e, g = project((gate, up), x, None if keys is None else (keys.get("gate_proj"), keys.get("up_proj")))
    return jax.nn.silu(e.astype(jnp.float32)).astype(e.dtype) * g
