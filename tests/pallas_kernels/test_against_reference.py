"""Every kernel x case x backend x dtype against its reference: result and every gradient of the contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KERNELS
from tests.pallas_kernels import h200

GPU_BACKENDS = {"cudnn", "mosaic", "triton"}


def runs():
    for kernel in KERNELS.values():
        for case in kernel.cases:
            for dtype in kernel.tolerance:
                made = kernel.cases[case](jnp.dtype(dtype))
                for backend in kernel.backends:
                    with h200.pretended():
                        refused = kernel.refuses(backend, **made.arrays, **made.static)
                    if refused is None:
                        marks = [pytest.mark.gpu] if backend in GPU_BACKENDS else []
                        yield pytest.param(kernel.name, case, backend, dtype, marks=marks, id=f"{kernel.name}-{case}-{backend}-{dtype}")


@pytest.mark.parametrize(("name", "case_name", "backend", "dtype"), list(runs()))
def test_result_and_gradients_equal_the_reference(name, case_name, backend, dtype):
    kernel = KERNELS[name]
    case = kernel.cases[case_name](jnp.dtype(dtype))
    varied = {n: case.arrays[n] for n in case.wrt}
    fixed = {n: x for n, x in case.arrays.items() if n not in case.wrt}

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(call, varied, fixed):
        out, pull = jax.vjp(lambda varied: call(**varied, **fixed, **case.static), varied)
        draw = np.random.default_rng(1)
        cotangent = jax.tree.map(lambda y: jnp.asarray(draw.standard_normal(y.shape), y.dtype), out)
        return {"result": out, **pull(cotangent)[0]}

    expected = value_and_gradients(kernel.reference, varied, fixed)
    found = value_and_gradients(functools.partial(kernel.backends[backend], **case.tuning), varied, fixed)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    errors = jax.tree.map(relative_error, found, expected)
    assert all(error <= kernel.tolerance[dtype] for error in jax.tree.leaves(errors)), errors


@pytest.mark.gpu
def test_triton_kernels_are_compiled_with_the_program_and_can_be_recorded():
    kernel = KERNELS["float8_rows"]
    case = next(iter(kernel.cases.values()))(jnp.dtype(jnp.bfloat16))
    compiled = jax.jit(lambda arrays: kernel.backends["triton"](**arrays, **case.static, **case.tuning)).lower(case.arrays).compile()
    (line,) = [line for line in compiled.as_text().splitlines() if "triton_kernel_call" in line and "custom_call_target" in line]
    assert 'custom_call_target="triton_kernel_call_ffi"' in line
    assert "api_version=API_VERSION_TYPED_FFI" in line


def relative_error(found, expected) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))
