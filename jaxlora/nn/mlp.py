"""Feed-forward blocks."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlora.nn.linear import Linear, project, project_activated
from jaxlora.typing import Array, Float, PRNGKeyArray


class GatedMLP(nnx.Module):
    """down(product(gate x, up x)), ``product`` being the class's own elementwise function of two arrays."""

    product: Callable[[Array, Array], Array]

    def __init__(self, features: int, hidden: int, *, bias: bool = False, dtype: Any = jnp.bfloat16):
        self.gate_proj = Linear(features, hidden, bias=bias, dtype=dtype)
        self.up_proj = Linear(features, hidden, bias=bias, dtype=dtype)
        self.down_proj = Linear(hidden, features, bias=bias, dtype=dtype)

    def __call__(self, x: Float[Array, "*N D"], keys: Mapping[str, PRNGKeyArray] | None = None) -> Float[Array, "*N D"]:
        """``keys``: a dropout key for each Linear that drops, by its name."""
        keys = keys or {}
        gated = project((self.gate_proj, self.up_proj), x, (keys.get("gate_proj"), keys.get("up_proj")))
        return project_activated(self.down_proj, type(self).product, gated, keys.get("down_proj"))


class PlainMLP(nnx.Module):
    """fc2(act(fc1 x)), with biases."""

    def __init__(self, features: int, hidden: int, *, activation: Callable[[Array], Array], dtype: Any = jnp.bfloat16):
        self.fc1 = Linear(features, hidden, bias=True, dtype=dtype)
        self.fc2 = Linear(hidden, features, bias=True, dtype=dtype)
        self.activation = activation

    def __call__(self, x: Float[Array, "*N D"], keys: Mapping[str, PRNGKeyArray] | None = None) -> Float[Array, "*N D"]:
        """``keys``: a dropout key for each Linear that drops, by its name."""
        keys = keys or {}
        return project_activated(self.fc2, self.activation, (self.fc1(x, keys.get("fc1")),), keys.get("fc2"))


def quick_gelu(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """x · sigmoid(1.702 x), in fp32 and rounded once (Hendrycks & Gimpel 2016, arXiv:1606.08415).

    >>> quick_gelu(jnp.array([0.0, 1.0])).round(3).tolist()
    [0.0, 0.8460000157356262]
    """
    x32 = x.astype(jnp.float32)
    return (x32 * jax.nn.sigmoid(1.702 * x32)).astype(x.dtype)


def gelu(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """x · Φ(x) with the normal distribution's exact Φ, in fp32 and rounded once.

    >>> gelu(jnp.array([0.0, 1.0])).round(3).tolist()
    [0.0, 0.8410000205039978]
    """
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def gelu_tanh(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """gelu by x / 2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), in fp32 and rounded once (Hendrycks & Gimpel 2016, arXiv:1606.08415).

    >>> gelu_tanh(jnp.array([0.0, 1.0])).round(4).tolist()
    [0.0, 0.8411999940872192]
    """
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def silu_product(e: Float[Array, "*N F"], g: Float[Array, "*N F"]) -> Float[Array, "*N F"]:
    """silu(e) ∘ g; silu is computed in fp32 and rounded before it multiplies, as transformers does.

    >>> silu_product(jnp.array([0.0, 1.0]), jnp.array([2.0, 2.0])).round(3).tolist()
    [0.0, 1.4620000123977661]
    """
    return jax.nn.silu(e.astype(jnp.float32)).astype(e.dtype) * g


def gelu_tanh_product(e: Float[Array, "*N F"], g: Float[Array, "*N F"]) -> Float[Array, "*N F"]:
    """gelu_tanh(e) ∘ g."""
    return gelu_tanh(e) * g


class SwiGLU(GatedMLP):
    """down(silu(gate x) ∘ up x)."""

    product = staticmethod(silu_product)


class GeGLU(GatedMLP):
    """down(gelu(gate x) ∘ up x), with tanh's approximation of gelu."""

    product = staticmethod(gelu_tanh_product)
