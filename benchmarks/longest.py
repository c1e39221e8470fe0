"""The longest sequence whose step fits into so many GB: ``python -m benchmarks.longest llama-3.1-8b --rank 32 --limits 24 48 80``.

Batch 1. Steps are compiled for shapes alone, without weights, and what each needs is read from ``memory_analysis()``: arguments, results
and temporaries. Needs a GPU, whose compiler answers. Prints one RESULT line a limit; a run under a memory cap is what proves one:

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.159 python -m benchmarks.train_step llama-3.1-8b --rank 32 --rows 1 --sequence LENGTH --steps 2
"""

import argparse
import functools
import pathlib
from collections.abc import Callable

import jax

from benchmarks import results, train_step
from benchmarks.geometries import GEOMETRIES
from jaxlora.train.auto import needed_gib
from jaxlora.train.meters import GIB

# Lengths are multiples of it.
UNIT = 1024
PROBES = (16_384, 65_536)


def longest(needed_gb: Callable[[int], float], limit_gb: float, tries: int = 6) -> tuple[int, float]:
    """(the longest length found to fit, its GB), by lines through two known lengths; exact to ``UNIT`` where ``tries`` suffice.

    >>> longest(lambda length: 6 + length / 4096, 24.0)
    (73728, 24.0)

    Raises:
      ValueError: not even ``UNIT`` tokens fit.
    """
    known = {length: needed_gb(length) for length in PROBES}
    for _ in range(tries):
        fits, fails = [n for n in known if known[n] <= limit_gb], [n for n in known if known[n] > limit_gb]
        low, high = max(fits, default=0), min(fails, default=None)
        if high is not None and high - low <= UNIT:
            break
        a, b = sorted(sorted(known, key=lambda n: abs(known[n] - limit_gb))[:2])
        slope = (known[b] - known[a]) / (b - a)
        guess = int(a + (limit_gb - known[a]) / slope) // UNIT * UNIT if slope > 0 else 2 * b
        guess = max(guess, low + UNIT) if high is None else min(max(guess, low + UNIT), high - UNIT)
        known[guess] = needed_gb(guess)
    fits = [n for n in known if known[n] <= limit_gb]
    if not fits:
        raise ValueError(f"no length fits into {limit_gb} GB; needed were {known}")
    return max(fits), known[max(fits)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=GEOMETRIES)
    parser.add_argument("--limits", type=float, nargs="+", default=[24.0, 48.0, 80.0], metavar="GB", help="GB of 1e9 bytes")
    parser.add_argument("--rank", default="32")
    parser.add_argument("--remat", default="unsloth")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--csv", type=pathlib.Path)
    parser.add_argument("--commit", default="")
    args = parser.parse_args()

    @functools.cache
    def needed_gb(length: int) -> float:
        options = ["--rank", args.rank, "--remat", args.remat, "--weights", args.weights, "--rows", "1", "--sequence", str(length)]
        lowered, _, _ = train_step.lower_abstract(GEOMETRIES[args.model], train_step.parser().parse_args([args.model, *options]))
        needed = needed_gib(lowered.compile()) * GIB / train_step.GB
        print(f"  {length:,} tokens: {needed:.2f} GB", flush=True)
        return needed

    for limit in args.limits:
        length, needed = longest(needed_gb, limit)
        where = results.provenance(jax.devices()[0].device_kind, ("jax",), args.commit)
        settings = {"model": args.model, "weights": args.weights, "rank": int(args.rank), "remat": args.remat}
        row = {**settings, "limit_gb": limit, "longest": length, "needed_gb": round(needed, 2), **where}
        results.print_result(row)
        if args.csv:
            results.append(args.csv, row)


if __name__ == "__main__":
    main()
