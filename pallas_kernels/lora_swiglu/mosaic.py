"""act(gate x) ∘ up x in one Mosaic GPU kernel, sm90; the device code is `pallas_kernels.mosaic_code`."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _tuned, mosaic_code
from pallas_kernels.packed import GROUP, Packed, Weight


def refuses(x: Array, gate: Weight, up: Weight, ranks: int, activation: str) -> str | None:
    """Why Mosaic cannot run this call here, or None."""
    if activation not in _ACTIVATIONS:
        return f"has no {activation}; there are {' and '.join(_ACTIVATIONS)}"
    if ranks > GROUP:
        return f"adds updates of up to {GROUP} columns in all, got {ranks}"
    wrong = mosaic_code.refuses(x, (gate, up))
    return wrong or (mosaic_code.refuses_shape(gate) if isinstance(gate, Packed) else None)


def gated(
    x: Float[Array, "N I"], gate: Packed, up: Packed, update: Any, activation: str
) -> tuple[Float[Array, "N F"], Float[Array, "N F"], Float[Array, "N F"]]:
    """(h, e, g)."""
    config = _tuned.config("lora_swiglu", "mosaic", mosaic_code.Config, (*x.shape, gate.shape[0]))

    def finish(gate_sum: Any, up_sum: Any) -> tuple[Any, Any, Any]:
        e, g = gate_sum.astype(jnp.bfloat16), up_sum.astype(jnp.bfloat16)
        return _ACTIVATIONS[activation](e.astype(jnp.float32)).astype(jnp.bfloat16) * g, e, g

    h, e, g = mosaic_code.products(x, (gate, up), None if update is None else (update[0], update[1:]), finish, 3, config)
    return h, e, g


def _silu(e: Any) -> Any:
    return e / (1.0 + jnp.exp(-e))


def _gelu_tanh(e: Any) -> Any:
    # 1 + tanh(z) = 2 / (1 + exp(-2 z))
    return e / (1.0 + jnp.exp(-1.5957691216057308 * (e + 0.044715 * e * e * e)))


_ACTIVATIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh}
