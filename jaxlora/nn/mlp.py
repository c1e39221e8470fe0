"""Feed-forward blocks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlora.nn.linear import Linear, project_activated, project_gated, project_mlp
from jaxlora.nn.pending import Pending
from jaxlora.nn.vjp import Wanted, hoisted, is_zero, scan_with_kernels, values
from jaxlora.typing import Array, Float, PRNGKeyArray
from pallas_kernels.functions import PLAIN, Function


class GatedMLP(nnx.Module):
    """down(act(gate x) ∘ up x); ``activation`` names a class's act, as `pallas_kernels.lora_swiglu` knows it."""

    activation: str

    def __init__(self, features: int, hidden: int, *, bias: bool = False, dtype: Any = jnp.bfloat16):
        self.gate_proj = Linear(features, hidden, bias=bias, dtype=dtype)
        self.up_proj = Linear(features, hidden, bias=bias, dtype=dtype)
        self.down_proj = Linear(hidden, features, bias=bias, dtype=dtype)

    @property
    def inputs(self) -> tuple[Linear, ...]:
        """The Linears that take its input."""
        return (self.gate_proj, self.up_proj)

    def __call__(self, x: Float[Array, "*N D"] | Pending, keys: Mapping[str, PRNGKeyArray] | None = None) -> Float[Array, "*N D"]:
        """``keys``: a dropout key for each Linear that drops, by its name."""
        gate_key, up_key, down_key = ((keys or {}).get(name) for name in ("gate_proj", "up_proj", "down_proj"))
        y = project_mlp((self.gate_proj, self.up_proj, self.down_proj), x, self.activation, (gate_key, up_key, down_key))
        if y is not None:
            return y
        gated, h = project_gated((self.gate_proj, self.up_proj), x, self.activation, (gate_key, up_key))
        return project_activated(self.down_proj, Function("gated", self.activation), gated, down_key, value=h)


def by_tiles(function: Callable[[Array], Array], x: Float[Array, "*N D"], tile: int | None) -> Float[Array, "*N D"]:
    """function(x) of a function of each token alone, ``tile`` tokens at a time at the most.

    A tile is recomputed in the backward from its part of x, so that an MLP's wide activations exist for one tile at a time (as in Bekman et
    al. 2025, arXiv:2506.13996), whatever is kept of the block around it. The tiles are equal; where no near number of them divides the
    tokens, there is one.
    """
    tokens = x.size // x.shape[-1]
    count = 1 if tile is None else tiles(tokens, tile)
    if count == 1:
        return function(x)
    parts = x.reshape(count, tokens // count, x.shape[-1])
    converted, consts = hoisted(function, jax.ShapeDtypeStruct(parts.shape[1:], x.dtype))
    return _by_tiles(converted, parts, consts).reshape(x.shape)


def _each_tile(function: Callable[..., Array], parts: Float[Array, "T N D"], consts: Sequence[Array]) -> Float[Array, "T N D"]:
    return scan_with_kernels(lambda _, part: (None, function(part, *consts)), None, parts)[1]


_by_tiles = jax.custom_vjp(_each_tile, nondiff_argnums=(0,))


def _by_tiles_fwd(function: Callable[..., Array], parts: Any, consts: Any) -> tuple[Array, Any]:
    wanted = Wanted.of(consts)
    parts, consts = values((parts, consts))
    return _each_tile(function, parts, consts), (parts, consts, wanted)


def _by_tiles_bwd(function: Callable[..., Array], residuals: Any, dys: Any) -> tuple[Any, Any]:
    parts, consts, wanted = residuals
    if is_zero(dys):
        return None, None

    def add(sums: Any, each: tuple[Array, Array]) -> tuple[Any, Array]:
        part, dy = each
        _, pull = jax.vjp(lambda part, few: function(part, *wanted.put(few, consts)), part, wanted.of_these(consts))
        dpart, few = pull(dy)
        return jax.tree.map(jnp.add, sums, few), dpart

    sums, dparts = scan_with_kernels(add, jax.tree.map(jnp.zeros_like, wanted.of_these(consts)), (parts, dys))
    return dparts, wanted.gradient(sums, consts)


_by_tiles.defvjp(_by_tiles_fwd, _by_tiles_bwd, symbolic_zeros=True)


def tiles(tokens: int, tile: int) -> int:
    """The least number of equal tiles of at most ``tile`` tokens, or 1 where the next few numbers divide the tokens no better.

    >>> tiles(8192, 4096), tiles(8192, 8192), tiles(6000, 4096), tiles(8191, 4096)
    (2, 1, 2, 1)
    """
    least = -(-tokens // tile)
    return next((count for count in range(least, 4 * least + 1) if tokens % count == 0), 1)


class PlainMLP(nnx.Module):
    """fc2(act(fc1 x)), with biases; ``activation`` is a name that `pallas_kernels.lora_input` knows."""

    def __init__(self, features: int, hidden: int, *, activation: str, dtype: Any = jnp.bfloat16):
        self.fc1 = Linear(features, hidden, bias=True, dtype=dtype)
        self.fc2 = Linear(hidden, features, bias=True, dtype=dtype)
        self.activation = activation

    @property
    def inputs(self) -> tuple[Linear, ...]:
        """The Linears that take its input."""
        return (self.fc1,)

    def __call__(self, x: Float[Array, "*N D"] | Pending, keys: Mapping[str, PRNGKeyArray] | None = None) -> Float[Array, "*N D"]:
        """``keys``: a dropout key for each Linear that drops, by its name."""
        return two_linears(self.fc1, self.fc2, x, self.activation, [(keys or {}).get(name) for name in ("fc1", "fc2")])


def two_linears(
    first: Linear, last: Linear, x: Float[Array, "*N D"] | Pending, activation: str, keys: Sequence[PRNGKeyArray | None]
) -> Float[Array, "*N O"]:
    """last(act(first x))."""
    y = project_mlp((first, last), x, activation, keys)
    return project_activated(last, PLAIN[activation], (first(x, keys[0]),), keys[1]) if y is None else y


class SwiGLU(GatedMLP):
    """down(silu(gate x) ∘ up x)."""

    activation = "silu"


class GeGLU(GatedMLP):
    """down(gelu(gate x) ∘ up x), with tanh's approximation of gelu."""

    activation = "gelu_tanh"
