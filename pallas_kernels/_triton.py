"""The one way to a Triton kernel: through jax-triton, imported when it is needed."""

import functools
import importlib.metadata
import importlib.util
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _kernel
from pallas_kernels.packed import Packed


@functools.cache
def missing() -> str | None:
    """Why no Triton kernel can run in this environment, or None."""
    absent = [name for name in ("jax_triton", "triton") if importlib.util.find_spec(name) is None]
    if absent:
        return f"needs {' and '.join(absent)}: pip install 'jaxlora[cuda]'"
    # From 0.4 on a result that takes an argument's place is no parameter of the kernel.
    version = importlib.metadata.version("jax_triton")
    return None if version.startswith("0.3.") else f"needs jax_triton 0.3, found {version}: pip install 'jaxlora[cuda]'"


def refuses() -> str | None:
    """Why no Triton kernel can run here, or None."""
    return _kernel.device().lacks((8, 0)) or missing()


def device_code() -> Any:
    """The module of the kernels around adapted products."""
    from pallas_kernels import triton_code

    return triton_code


def weight_code() -> Any:
    """The module of the products with packed weights."""
    from pallas_kernels import weight_triton_code

    return weight_triton_code


def row_code() -> Any:
    """The module of the kernels of whole rows."""
    from pallas_kernels import row_triton_code

    return row_triton_code


def float8_code() -> Any:
    """The module of the kernels around products in e4m3."""
    from pallas_kernels import float8_triton_code

    return float8_triton_code


def block_r(rank: int, *, summing: bool = False) -> int:
    """The power of two, at least 16, that holds a rank; at least 64 for products that are ``summing`` up a wide tile on sm90 and up.

    The tensor cores there take 64 rows, and the tile from shared memory; of fewer rows they take it from registers, for which Triton makes
    the tile a second time, activation and all.
    """
    capability = _kernel.device().capability
    wide = summing and capability is not None and capability >= (9, 0)
    return max(64 if wide else 16, 1 << (rank - 1).bit_length())


def packed_arrays(weight: Packed) -> tuple[Any, ...]:
    """(codes, scales, code book, layer) as kernels take them; what there is not, they do not read."""
    book = weight.scales if weight.code_book is None else weight.code_book
    return weight.codes, weight.scales, book, weight.scales if weight.layer is None else weight.layer.reshape(1)


def put_beside(h: Float[Array, "N C"], u: Float[Array, "N R"], padding: int | None) -> Float[Array, "N C"]:
    """h, whose last columns become u and so many zeros, in place; h as it is without any ``padding``."""
    if padding is None:
        return h
    spare = jnp.pad(u, ((0, 0), (0, padding)))
    return jax.lax.dynamic_update_slice(h, spare, (0, h.shape[1] - spare.shape[1]))


@functools.cache
def _lower_to_typed_interface() -> None:
    """Lowers jax-triton's calls to jaxlib's handler of XLA's typed interface, as jax-triton 0.4 does, instead of the older one.

    XLA records those calls together with the kernels around them, so that copies run beside them too, and compiles and caches them with
    the program. All of jax-triton's calls in this process, for they have one primitive.
    """
    import triton  # pyright: ignore[reportMissingImports]
    from jax.interpreters import mlir
    from jax_triton import triton_lib  # pyright: ignore[reportMissingImports]
    from jaxlib.mlir import ir

    triton_lib.triton_kernel_call_lib = _without_sources(triton_lib.triton_kernel_call_lib)

    def lower(context: Any, *arguments: Any, **params: Any) -> Any:
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.disable_line_info = True
            results = triton_lib.triton_kernel_call_lowering(triton_lib.get_cuda_backend, context, *arguments, **params)
        attributes = results[0].owner.attributes
        attributes["call_target_name"] = ir.StringAttr.get("triton_kernel_call_ffi")
        attributes["api_version"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 4)
        attributes["backend_config"] = ir.DictAttr.get({"opaque": attributes["backend_config"]})
        return results

    mlir.register_lowering(triton_lib.triton_kernel_call_p, lower, platform="cuda")


def _without_sources(library: Any) -> Any:
    """jaxlib's part of jax-triton, whose kernels then carry what is run, but not the Triton code that it was made from.

    jaxlib looks each call up by all that it carries, in every step: 451 calls of 11 KB were 3 ms before the first kernel of Qwen2-VL-7B.
    """

    def kernel(name: str, warps: int, ctas: int, shared_bytes: int, ptx: str, _: str, capability: int) -> Any:
        return library.TritonKernel(name, warps, ctas, shared_bytes, ptx, "", capability)

    return types.SimpleNamespace(**{**vars(library), "TritonKernel": kernel})


def call(
    kernel: Any,
    *arguments: Any,
    out: Any,
    grid: tuple[int, ...],
    config: Mapping[str, int],
    in_place: Mapping[int, int] | None = None,
    **constants: Any,
) -> Any:
    """Launches a ``@triton.jit`` kernel of the arguments and then the outputs; an int may differ without another compilation.

    ``config`` has its blocks, warps and stages; ``in_place`` says which arguments' buffers become which outputs', by position.
    """
    import jax_triton  # pyright: ignore[reportMissingImports]

    _lower_to_typed_interface()
    capability = _kernel.device().capability
    assert capability is not None, "refuses() lets no call come here without one"
    # Else jax-triton asks the first GPU, and nothing could be lowered for one that is not here.
    how: Any = {"compute_capability": 10 * capability[0] + capability[1], "input_output_aliases": dict(in_place or {})}
    return jax_triton.triton_call(*arguments, kernel=kernel, grid=grid, out_shape=out, **how, **constants, **config)
