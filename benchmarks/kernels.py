"""Every kernel at the sizes of training, every backend that runs here, and plain JAX: ``python -m benchmarks.kernels``.

First each backend's result and gradients are compared with the kernel's reference on the same inputs; what is wrong, or cannot be compared
because the reference does not fit, is said. Then the forward pass, and both passes, are timed: programs of several calls on different
inputs, waited for; the median, by call. ``limit`` is the share of the time that the products need at the best measured rate, or the bytes
at the best measured bandwidth, whichever is longer.
"""

import argparse
import functools
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import results
from benchmarks.kernel_sizes import DTYPE, SIZES, Size
from pallas_kernels import KERNELS, Case, Kernel

# One H200, 2026-11-22: cuBLAS through XLA, bf16, 8192 x 4096 x 14336; a device copy, bytes read and written.
FLOPS_PER_S = 750e12
BYTES_PER_S = 4.3e12
CALLS = 4
PROGRAMS = 12

type Call = Callable[..., Any]


def with_gradients(call: Call, case: Case) -> Call:
    """(result, gradients of the contract) for a cotangent of ones."""

    def both(**arrays: Any) -> Any:
        fixed = {name: array for name, array in arrays.items() if name not in case.wrt}
        out, pull = jax.vjp(lambda varied: call(**varied, **fixed, **case.static), {name: arrays[name] for name in case.wrt})
        return out, pull(jax.tree.map(jnp.ones_like, out))[0]

    return both


def forward(call: Call, case: Case) -> Call:
    return lambda **arrays: call(**arrays, **case.static)


def median_s(call: Call, inputs: Sequence[Any], *, programs: int = PROGRAMS) -> float:
    """Seconds a call: one program runs ``call`` on each of ``inputs``."""

    @jax.jit
    def program(inputs: Any) -> Any:
        # Behind the barrier XLA cannot see that one element of each result is all that is asked for.
        outs = [jax.lax.optimization_barrier(call(**arrays)) for arrays in inputs]
        return [leaf.ravel()[0] for leaf in jax.tree.leaves(outs)]

    jax.block_until_ready(program(inputs))
    seconds = []
    for _ in range(programs):
        started = time.perf_counter()
        jax.block_until_ready(program(inputs))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) / len(inputs)


def relative_error(found: Any, expected: Any) -> float:
    """The largest of all arrays, in the Frobenius norm; NaN where one is."""

    def one(f: Any, e: Any) -> float:
        f, e = f.astype(jnp.float32), e.astype(jnp.float32)
        return float(jnp.linalg.norm((f - e).ravel()) / jnp.maximum(jnp.linalg.norm(e.ravel()), 1e-30))

    return float(np.max(jax.tree.leaves(jax.tree.map(one, found, expected))))


def limit_s(flops: float, nbytes: float) -> float:
    """The least time that anyone may hope for.

    >>> limit_s(750e12, 0.0), limit_s(0.0, 4.3e12)
    (1.0, 1.0)
    """
    return max(flops / FLOPS_PER_S, nbytes / BYTES_PER_S)


def moved_bytes(call: Call, arrays: Any) -> int:
    """What has to be read and written at least: the arguments and the results."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((arrays, jax.eval_shape(call, **arrays))))


def candidates(kernel: Kernel, size: Size, case: Case) -> dict[str, Call | str]:
    """What to time, or why it cannot run: every backend, and plain JAX where there is such."""
    found: dict[str, Call | str] = {}
    for name, backend in kernel.backends.items():
        reason = kernel.refuses(name, **case.arrays, **case.static)
        found[name] = functools.partial(backend, **case.tuning) if reason is None else reason
    return found if size.plain is None else {**found, "plain JAX": size.plain}


def check(kernel: Kernel, call: Call, expected: Any, case: Case) -> str | None:
    """Why a candidate is wrong, or None."""
    error = relative_error(jax.jit(with_gradients(call, case))(**case.arrays), expected)
    most = kernel.tolerance[jnp.dtype(DTYPE).name]
    return None if error <= most else f"relative error {error:.1e} from the reference, allowed are {most:.0e}"


def rows_of(kernel: Kernel, label: str, size: Size, *, programs: int) -> list[dict[str, Any]]:
    """Checks and times one call of a kernel: a row for each candidate and pass. What fails is told, and the others go on."""
    case = size.case(jax.random.key(0))
    inputs = [size.case(jax.random.key(i)).arrays for i in range(CALLS)]
    expected = None
    if size.reference:
        with jax.default_matmul_precision("highest"):
            expected = jax.jit(with_gradients(kernel.reference, case))(**case.arrays)
    rows = []
    for name, call in candidates(kernel, size, case).items():
        if isinstance(call, str):
            print(f"  {name:10} cannot run: {call}", flush=True)
            continue
        # What plain JAX rounds is its own affair.
        checked = expected is not None and name in kernel.backends
        try:
            wrong = check(kernel, call, expected, case) if checked else None
            found = [] if wrong else [timed_row(call, case, inputs, size, what, programs) for what in PASSES]
        except (RuntimeError, ValueError, NotImplementedError) as error:
            wrong, found = f"{type(error).__name__}: {error}", []
        if wrong:
            print(f"  {name:10} FAILED, not timed: {wrong}", flush=True)
        for row in found:
            rows.append({"kernel": kernel.name, "size": label, "backend": name, "checked": checked, **row})
            print(_line(rows[-1]), flush=True)
    return rows


def timed_row(call: Call, case: Case, inputs: Sequence[Any], size: Size, what: str, programs: int) -> dict[str, Any]:
    """The figures of one pass."""
    timed, flops = PASSES[what](call, case), size.flops[list(PASSES).index(what)]
    seconds, nbytes = median_s(timed, inputs, programs=programs), moved_bytes(timed, case.arrays)
    rates = {"tflop_s": round(flops / seconds / 1e12, 1), "tb_s": round(nbytes / seconds / 1e12, 3)}
    return {"pass": what, "ms": round(1e3 * seconds, 4), **rates, "limit": round(limit_s(flops, nbytes) / seconds, 3)}


PASSES = {"forward": forward, "both": with_gradients}


def _line(row: dict[str, Any]) -> str:
    rates = f"{row['tflop_s']:7.1f} TFLOP/s {row['tb_s']:6.3f} TB/s {row['limit']:6.1%} of the limit"
    return f"  {row['backend']:10} {row['pass']:8} {row['ms']:9.4f} ms {rates}{'' if row['checked'] else '; not compared'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="*", default=list(KERNELS), help="names; all without")
    parser.add_argument("--only", default="", help="sizes whose label has this text")
    parser.add_argument("--programs", type=int, default=PROGRAMS, help="programs that are timed, of which the median counts")
    parser.add_argument("--csv", type=pathlib.Path)
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    where = results.provenance(jax.devices()[0].device_kind, ("jax", "jax-triton"), args.commit)
    for name in args.kernels:
        if name not in SIZES:
            print(f"{name}: no sizes; add a line to benchmarks/kernel_sizes.py", flush=True)
        for label, size in SIZES.get(name, {}).items():
            if args.only not in label:
                continue
            print(f"{name}, {label}", flush=True)
            for row in rows_of(KERNELS[name], label, size, programs=args.programs):
                if args.csv:
                    results.append(args.csv, {**row, **where})


if __name__ == "__main__":
    main()
