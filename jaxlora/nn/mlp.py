"""Feed-forward blocks."""

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
        """``keys``: one dropout key a Linear, by its name."""
        h = swiglu(self.gate_proj, self.up_proj, x, keys)
        return self.down_proj(h, None if keys is None else keys["down_proj"])


def swiglu(gate: Linear, up: Linear, x: Float[Array, "*N D"], keys: dict[str, PRNGKeyArray] | None = None) -> Float[Array, "*N F"]:
    """silu(gate x) ∘ up x with one shared x; silu is computed in fp32 and rounded before it multiplies, as transformers does."""
    e, g = project((gate, up), x, None if keys is None else (keys["gate_proj"], keys["up_proj"]))
    return jax.nn.silu(e.astype(jnp.float32)).astype(e.dtype) * g
