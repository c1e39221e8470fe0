"""What can be known of GPU kernels without a GPU: Mosaic's lower for an H200, Triton's compute the right numbers in its interpreter."""

import functools
import importlib.metadata
import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import KERNELS, _triton
from pallas_kernels.adapted_activation import triton as adapted_backend
from pallas_kernels.adapted_sum import triton as sum_backend
from pallas_kernels.float8_rows import triton as rows_backend
from pallas_kernels.float8_transposed import float8_transposed
from pallas_kernels.float8_transposed import triton as turned_backend
from pallas_kernels.float8_weight import triton as weight_backend
from pallas_kernels.gated_gradients import triton as gradients_backend
from pallas_kernels.int4_matmul import int4_matmul
from pallas_kernels.int4_matmul import triton as product_backend
from pallas_kernels.logsumexp import triton as logsumexp_backend
from pallas_kernels.lora_input import triton as input_backend
from pallas_kernels.lora_swiglu import triton as gated_backend
from pallas_kernels.norm_gradient import triton as norm_backend
from pallas_kernels.packed import reference_decode
from pallas_kernels.plain_gradients import triton as plain_backend
from tests.jaxlora.reference import run_oracle
from tests.pallas_kernels import h200

BLOCKS = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "BAND": 2}
PACKED = ("int4_matmul", "lora_swiglu")
TRITON = {
    "int4_matmul": product_backend,
    "lora_swiglu": gated_backend,
    "adapted_activation": adapted_backend,
    "adapted_sum": sum_backend,
    "float8_rows": rows_backend,
    "float8_transposed": turned_backend,
    "float8_weight": weight_backend,
    "gated_gradients": gradients_backend,
    "logsumexp": logsumexp_backend,
    "lora_input": input_backend,
    "plain_gradients": plain_backend,
    "norm_gradient": norm_backend,
}


def mosaic_cases():
    for kernel in (KERNELS[name] for name in PACKED):
        for name, make in kernel.cases.items():
            case = make(jnp.bfloat16)
            with h200.pretended():
                if kernel.refuses("mosaic", **case.arrays, **case.static) is None:
                    yield pytest.param(kernel, case, id=f"{kernel.name}-{name}")


@pytest.mark.parametrize(("kernel", "case"), list(mosaic_cases()))
def test_mosaic_lowers_for_an_h200_to_one_kernel(kernel, case):
    text = h200.lowered_text(lambda arrays: kernel.backends["mosaic"](**arrays, **case.static), case.arrays)
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 1


def test_mosaic_lowers_the_input_gradient_of_a_swiglu_as_one_kernel():
    kernel = KERNELS["lora_swiglu"]
    case = kernel.cases["plain"](jnp.bfloat16)

    def gradient(x, others):
        return jax.grad(lambda x: kernel.backends["mosaic"](x, **others).astype(jnp.float32).sum())(x)

    others = {name: value for name, value in case.arrays.items() if name != "x"}
    text = h200.lowered_text(gradient, case.arrays["x"], others)
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 2


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"dtype": jnp.float32}, "needs bfloat16, got float32"),
        ({"form": "nf4"}, "decodes int4 alone"),
        ({"shape": (64, 128)}, "needs a multiple of 128 output columns, got 64"),
        ({"rank": 65}, "adds updates of up to 64 columns, got 65"),
    ],
)
def test_mosaic_says_why_it_cannot_run(arrays, reason):
    made = {"rows": 8, "shape": (128, 128), "rank": 4, **arrays}
    case = KERNELS["int4_matmul"].cases["one_row"].func(made.pop("dtype", jnp.bfloat16), **made)
    with h200.pretended(), pytest.raises(NotImplementedError, match=reason):
        int4_matmul(**case.arrays, backend="mosaic")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"rows": (68, 70)}, "writes the rows of a weight in fours, got 68, 70"),
        ({"rows": (64,) * 4}, "takes up to 3 weights of one format, .* got 4"),
    ],
)
def test_triton_says_which_weights_it_cannot_turn(given, reason):
    case = KERNELS["float8_transposed"].cases["int4"].func(jnp.bfloat16, **{"width": 64, "form": "int4", **given})
    with h200.pretended(), pytest.raises(NotImplementedError, match=reason):
        float8_transposed(**case.arrays, backend="triton")


def test_triton_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(_triton, "missing", lambda: "needs jax_triton: pip install 'jaxlora[cuda]'")
    case = KERNELS["int4_matmul"].cases["one_row"](jnp.bfloat16)
    with h200.pretended(), pytest.raises(NotImplementedError, match=r"needs jax_triton: pip install 'jaxlora\[cuda\]'"):
        int4_matmul(**case.arrays, backend="triton")


@pytest.mark.parametrize(
    ("absent", "version", "reason"),
    [
        ({"triton"}, "0.3.1", "needs triton: pip install 'jaxlora[cuda]'"),
        (set(), "0.4.1", "needs jax_triton 0.3, found 0.4.1: pip install 'jaxlora[cuda]'"),
        (set(), "0.3.1", None),
    ],
    ids=["absent", "another version", "there"],
)
def test_triton_needs_the_version_whose_results_are_parameters(monkeypatch, absent, version, reason):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert _triton.missing.__wrapped__() == reason


def test_triton_calls_carry_no_source():
    library = types.SimpleNamespace(TritonKernel=lambda *fields: fields, create_scalar_parameter=len)
    lean = _triton._without_sources(library)
    assert lean.TritonKernel("matmul", 4, 1, 512, "ptx", "ttir", 90) == ("matmul", 4, 1, 512, "ptx", "", 90)
    assert lean.create_scalar_parameter is len


def recorded(name, case, calls):
    """What the Triton backend would launch for a case, on fp32 arrays (the interpreter multiplies no bf16)."""
    launched = {}

    def record(kernel, *arguments, out, grid, config, in_place=None, **constants):
        outputs = jax.tree.leaves(out)
        launched.update(kernel=kernel, arguments=arguments, outputs=outputs, programs=grid[0], constants={**config, **constants})
        return jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), out)

    calls(record)
    constants = {k: v for k, v in launched["constants"].items() if k not in ("num_warps", "num_stages")}
    outputs = [(like.shape, like.dtype == jnp.uint32) for like in launched["outputs"]]
    call = {"kernel": launched["kernel"], "constants": constants, "programs": launched["programs"], "outputs": outputs}
    arguments = [np.asarray(a.astype(jnp.float32) if getattr(a, "dtype", None) == jnp.bfloat16 else a) for a in launched["arguments"]]
    return {name: json.dumps({**call, "arguments": len(arguments)}), **{f"{name}/{i}": a for i, a in enumerate(arguments)}}


def interpreted(names, monkeypatch, tmp_path):
    """(name, kernel, case, outputs of the launch) of all cases of some kernels, run by Triton's interpreter."""
    files, cases = {}, {}
    for kernel in (KERNELS[name] for name in names):
        for name, make in kernel.cases.items():
            case = make(jnp.float32)
            cases[f"{kernel.name}.{name}"] = kernel, case
            files |= recorded(f"{kernel.name}.{name}", case, functools.partial(launch, kernel, case, monkeypatch))
    np.savez(tmp_path / "calls.npz", **files)
    run_oracle("run_triton.py", tmp_path / "calls.npz", tmp_path / "results.npz")
    with np.load(tmp_path / "results.npz") as found:
        for name, (kernel, case) in cases.items():
            yield name, kernel, case, [found[f"{name}/{i}"] for i in range(sum(key.startswith(f"{name}/") for key in found.files))]


def assert_near(kernel, ours, value, name):
    assert np.linalg.norm(ours - value) <= kernel.tolerance["float32"] * np.linalg.norm(value), name


@pytest.mark.oracle
def test_triton_kernels_compute_what_the_references_do(monkeypatch, tmp_path):
    names = [name for name in TRITON if name not in ("lora_input", "adapted_activation", "float8_transposed", "float8_weight")]
    for name, kernel, case, outputs in interpreted(names, monkeypatch, tmp_path):
        expected = jax.tree.leaves(kernel.reference(**case.arrays, **case.static))
        if "padding" in case.static:
            # The room is filled in place afterwards; of two arrays the second is not written.
            wide = 2 * case.arrays["e"].shape[1]
            outputs, expected = [outputs[0][:, :wide], *outputs[2:]], [expected[0][:, :wide], *expected[1:]]
        # A kernel may have more outputs, for calls that ask for them.
        for i, (ours, value) in enumerate(zip(outputs, expected, strict=False)):
            # Sums over the rows come in parts, and rank by column.
            ours = (
                ours if ours.shape == value.shape else ours.sum(0).reshape(value.shape) if ours.shape[1:] == value.shape else ours.sum(0).T
            )
            # The interpreter's arrays are fp32, whatever the kernel rounds to.
            assert_near(kernel, ours.astype(value.dtype).astype(np.float32), value.astype(np.float32), (name, i))


@pytest.mark.oracle
def test_triton_leaves_room_for_the_columns_of_what_it_makes(monkeypatch, tmp_path):
    for name, kernel, case, outputs in interpreted(["lora_input", "adapted_activation"], monkeypatch, tmp_path):
        (both, u, *statistics), width = kernel.reference(**case.arrays, **case.static), case.arrays["a"].shape[1]
        assert_near(kernel, outputs[0][:, :width], both[:, :width], name)
        if case.static["function"].activation:
            assert_near(kernel, outputs[1].sum(0), u, name)
        else:
            assert not outputs[0][:, width:].any(), "a product takes them for zeros"
            assert_near(kernel, outputs[1], statistics[0], name)


@pytest.mark.oracle
@pytest.mark.parametrize("which", ["float8_transposed", "float8_weight"])
def test_triton_rounds_weights_and_turns_them_around(which, monkeypatch, tmp_path):
    for name, kernel, case, (words,) in interpreted([which], monkeypatch, tmp_path):
        ours, value = (np.asarray(a, np.float32) for a in (words.view(ml_dtypes.float8_e4m3fn), kernel.reference(**case.arrays)))
        weights = case.arrays.get("weights") or [case.arrays["weight"]]
        exact = jnp.concatenate([reference_decode(weight.alone(), jnp.float32) for weight in weights]) / case.arrays["scale"]
        ours, value = (a.T if kernel.name == "float8_transposed" else a for a in (ours, value))
        width = weights[0].width
        assert not ours[:, width:].any(), name
        # The interpreter rounds up what is halfway, and loses the carry of what is rounded to a power of two.
        near, nearest = (np.abs(a[:, :width] - exact) for a in (ours, value))
        carried = np.frexp(value[:, :width])[1] != np.frexp(exact)[1]
        assert (carried | (near <= nearest + 1e-5 * np.abs(exact))).all() and carried.mean() < 0.05, name


def launch(kernel, case, monkeypatch, record):
    """Has the Triton backend of a kernel launch into ``record``, with small blocks."""
    module = TRITON[kernel.name]
    monkeypatch.setattr(_triton, "call", record)
    for code in ("device_code", "weight_code", "row_code", "float8_code"):
        monkeypatch.setattr(_triton, code, lambda: NAMES)
    monkeypatch.setattr(module, "refuses", lambda *_: None)
    config = module.Config(**{name: size for name, size in BLOCKS.items() if hasattr(module.Config, name)})
    monkeypatch.setattr(module._tuned, "config", lambda *_: config)
    kernel.backends["triton"](**case.arrays, **case.static)


class NAMES:
    """Stands for the device code where Triton is not installed: kernels are their names."""

    matmul, matmul_t, gated, gated_gradients = "matmul", "matmul_t", "gated", "gated_gradients"
    plain_gradients, norm_gradient = "plain_gradients", "norm_gradient"
    adapted_activation, float8_rows, float8_transposed = "adapted_activation", "float8_rows", "float8_transposed"
    float8_weight = "float8_weight"
    activated_input, normed_input, logsumexp, adapted_sum = "activated_input", "normed_input", "logsumexp", "adapted_sum"
