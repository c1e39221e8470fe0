"""Measures blocks of the packed kernels on this GPU and writes ``pallas_kernels/tuned/<device>.json``: ``python -m benchmarks.tune``.

Every configuration is first compared with the kernel's reference at a small size, then timed at each size of training (`kernel_sizes`).
``fastest`` is the backend that is fastest in all: what "auto" takes. What fails to compile or is wrong is told and left out.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax

from benchmarks.kernel_sizes import SIZES
from benchmarks.kernels import CALLS, forward, median_s, relative_error
from pallas_kernels import KERNELS, Case, Kernel, _tuned, mosaic_code, mosaic_gradient
from pallas_kernels.int4_matmul import triton as product_triton
from pallas_kernels.lora_swiglu import triton as gated_triton

FOLDER = pathlib.Path(_tuned.__file__).parent / "tuned"


def mosaic_configs() -> Iterator[Any]:
    for block_m, stages in itertools.product((64, 128, 192, 256), (3, 4)):
        yield mosaic_code.Config(block_m=block_m, stages=stages)


def gradient_configs() -> Iterator[Any]:
    for stages, band in itertools.product((2, 3), (4, 8, 16)):
        yield mosaic_gradient.Config(stages=stages, band=band)


def triton_configs(kind: type[Any]) -> Iterator[Any]:
    for (m, n), stages in itertools.product(((128, 64), (128, 128), (256, 64), (256, 128), (64, 128)), (3, 4)):
        yield kind(BLOCK_M=m, BLOCK_N=n, num_stages=stages)


# (kernel, backend, key of the table, configurations); a transposed product is another kernel with blocks of its own.
SPACES = (
    ("lora_swiglu", "mosaic", "mosaic", mosaic_configs),
    ("lora_swiglu", "triton", "triton", lambda: triton_configs(gated_triton.Config)),
    ("int4_matmul", "mosaic", "mosaic", mosaic_configs),
    ("int4_matmul", "mosaic", "mosaic_transposed", gradient_configs),
    ("int4_matmul", "triton", "triton", lambda: triton_configs(product_triton.Config)),
)


def using(config: Any) -> Any:
    """Has the kernels take this configuration."""
    return mock.patch.object(_tuned, "config", lambda *_: config)


def small_error(kernel: Kernel, backend: str, transpose: bool) -> str | None:
    """Why the configuration in use is wrong at a small size, or None."""
    case = kernel.cases["adapted_transposed" if transpose else "several_tiles"](jax.numpy.bfloat16)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(forward(kernel.reference, case))(**case.arrays)
    error = relative_error(jax.jit(forward(kernel.backends[backend], case))(**case.arrays), expected)
    return None if error <= kernel.tolerance["bfloat16"] else f"relative error {error:.1e}"


def timed(kernel: Kernel, backend: str, case: Case, inputs: Any, config: Any) -> float | str:
    """Milliseconds a call, or what is wrong."""
    with using(config):
        try:
            wrong = small_error(kernel, backend, bool(case.static.get("transpose")))
            return wrong or 1e3 * median_s(forward(kernel.backends[backend], case), inputs, programs=5)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            return f"{type(error).__name__}: {str(error)[:160]}"


def sizes_of(case: Case) -> str:
    """The key of a size: rows x contracted x columns."""
    weight = case.arrays.get("weight", case.arrays.get("gate"))
    assert weight is not None
    rows, contracted = case.arrays["x"].shape
    return f"{rows} x {contracted} x {weight.shape[1] if case.static.get('transpose') else weight.shape[0]}"


def tune(name: str, backend: str, key: str, configs: Any, only: str) -> dict[str, Any]:
    """The best configuration for each size, with its milliseconds and the date."""
    kernel, found = KERNELS[name], {}
    for label, size in SIZES[name].items():
        case = size.case(jax.random.key(0))
        if only not in label or bool(case.static.get("transpose")) != key.endswith("transposed"):
            continue
        inputs = [size.case(jax.random.key(i)).arrays for i in range(CALLS)]
        best = None
        for config in configs():
            ms = timed(kernel, backend, case, inputs, config)
            print(f"{name} {key} {label} {dataclasses.asdict(config)}: {ms if isinstance(ms, str) else f'{ms:.4f} ms'}", flush=True)
            if not isinstance(ms, str) and (best is None or ms < best["ms"]):
                best = {"config": dataclasses.asdict(config), "ms": round(ms, 4), "date": datetime.date.today().isoformat()}
        if best is not None:
            found[sizes_of(case)] = best
    return found


def fastest(name: str, table: dict[str, Any], only: str) -> str:
    """The backend with the least time over the sizes that all have; "xla" is timed here."""
    totals = {"xla": 0.0}
    for label, size in SIZES[name].items():
        case = size.case(jax.random.key(0))
        if only not in label or case.static.get("transpose"):
            continue
        inputs = [size.case(jax.random.key(i)).arrays for i in range(CALLS)]
        totals["xla"] += 1e3 * median_s(forward(KERNELS[name].backends["xla"], case), inputs, programs=5)
        for backend in ("mosaic", "triton"):
            totals[backend] = totals.get(backend, 0.0) + table.get(backend, {}).get(sizes_of(case), {}).get("ms", float("inf"))
    print(f"{name}: {', '.join(f'{backend} {ms:.3f} ms' for backend, ms in totals.items())}", flush=True)
    return min(totals, key=lambda backend: totals[backend])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="one kernel; all without")
    parser.add_argument("--backend", default="", help="one backend; all without")
    parser.add_argument("--only", default="", help="sizes whose label has this text")
    parser.add_argument("--out", type=pathlib.Path, help="another folder than pallas_kernels/tuned")
    args = parser.parse_args()
    path = (args.out or FOLDER) / f"{jax.devices()[0].device_kind}.json"
    table = json.loads(path.read_text()) if path.is_file() else {}
    for name, backend, key, configs in SPACES:
        if args.kernel in name and args.backend in backend:
            table.setdefault(name, {}).setdefault(key, {}).update(tune(name, backend, key, configs, args.only))
            table[name]["fastest"] = fastest(name, table[name], args.only)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
