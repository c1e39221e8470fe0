"""Where a step's GPU time goes: ``python -m benchmarks.kernel_times TRACE_FOLDER --steps 2``.

Reads the trace that ``jax.profiler.trace(..., create_perfetto_trace=True)`` wrote and prints the time in which no kernel ran, how much of
it went by with copies to or from the host, what waited longest for what, and the kernels by their share.
"""

import argparse
import collections
import gzip
import itertools
import json
import pathlib
from collections.abc import Sequence

type Event = tuple[str, float, float]

_HOST_COPIES = ("MemcpyD2H", "MemcpyH2D")


def events(folder: pathlib.Path) -> list[Event]:
    """(name, start, duration) in microseconds of everything that ran on a GPU stream."""
    (file,) = folder.rglob("perfetto_trace.json.gz")
    found = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in found if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in found if e.get("name") == "thread_name"}
    return [
        (e["name"], e["ts"], e["dur"])
        for e in found
        if e.get("ph") == "X" and "GPU" in processes.get(e["pid"], "") and threads.get((e["pid"], e["tid"]), "").startswith("Stream")
    ]


def gaps(found: Sequence[Event]) -> list[tuple[str, str, float, float]]:
    """(kernel before, kernel after, duration, of which copies to or from the host ran) of each time without a kernel, in microseconds.

    >>> gaps([("a", 0.0, 2.0), ("b", 1.0, 4.0), ("MemcpyD2H", 1.0, 8.0), ("c", 10.0, 1.0)])
    [('b', 'c', 5.0, 4.0)]
    """
    kernels = sorted((e for e in found if not e[0].startswith(_HOST_COPIES)), key=lambda e: e[1])
    copies = collections.deque(sorted((start, start + duration) for name, start, duration in found if name.startswith(_HOST_COPIES)))
    result: list[tuple[str, str, float, float]] = []
    last, end = "", kernels[0][1]
    for name, start, duration in kernels:
        if start > end:
            while copies and copies[0][1] <= end:
                copies.popleft()
            those = itertools.takewhile(lambda copy, start=start: copy[0] < start, copies)
            copied = _covered([(max(begin, end), min(until, start)) for begin, until in those])
            result.append((last, name, start - end, copied))
        if start + duration > end:
            last, end = name, start + duration
    return result


def _covered(intervals: Sequence[tuple[float, float]]) -> float:
    """The length of the union of intervals, of which those that end before they begin are none."""
    total, end = 0.0, float("-inf")
    for begin, until in sorted(intervals):
        total += max(0, until - max(begin, end))
        end = max(end, until)
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--top", type=int, default=60)
    args = parser.parse_args()
    found = events(args.folder)
    total, count = collections.Counter(), collections.Counter()
    for name, _, duration in found:
        total[name] += duration
        count[name] += 1
    busy_ms = sum(total.values()) / 1e3 / args.steps
    span_ms = (max(s + d for _, s, d in found) - min(s for _, s, _ in found)) / 1e3 / args.steps
    idle = gaps(found)
    waited = collections.Counter()
    for before, after, duration, _ in idle:
        waited[before, after] += duration
    idle_ms, copying_ms = (sum(gap[i] for gap in idle) / 1e3 / args.steps for i in (2, 3))
    print(
        f"{idle_ms:.1f} ms a step without a kernel, {copying_ms:.1f} of them with copies to or from the host; ms, after what, before what:"
    )
    for (before, after), duration in waited.most_common(5):
        print(f"{duration / 1e3 / args.steps:8.2f}  {before[:60]} -> {after[:60]}")
    print(f"{busy_ms:.1f} ms of kernels in {span_ms:.1f} ms a step; ms a step, calls a step, us a call:")
    for name, duration in total.most_common(args.top):
        print(f"{duration / 1e3 / args.steps:8.2f} {count[name] / args.steps:7.1f} {duration / count[name]:9.1f}  {name[:100]}")


if __name__ == "__main__":
    main()
