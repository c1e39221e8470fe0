"""Where a step's GPU time goes: ``python -m benchmarks.kernel_times TRACE_FOLDER --steps 2``.

Reads the trace that ``jax.profiler.trace(..., create_perfetto_trace=True)`` wrote and prints the kernels by their share.
"""

import argparse
import collections
import gzip
import json
import pathlib


def kernels(folder: pathlib.Path) -> list[tuple[str, float, float]]:
    """(name, start, duration) in microseconds of everything that ran on a GPU stream."""
    (file,) = folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    return [
        (e["name"], e["ts"], e["dur"])
        for e in events
        if e.get("ph") == "X" and "GPU" in processes.get(e["pid"], "") and threads.get((e["pid"], e["tid"]), "").startswith("Stream")
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--top", type=int, default=60)
    args = parser.parse_args()
    found = kernels(args.folder)
    total, count = collections.Counter(), collections.Counter()
    for name, _, duration in found:
        total[name] += duration
        count[name] += 1
    busy_ms = sum(total.values()) / 1e3 / args.steps
    span_ms = (max(s + d for _, s, d in found) - min(s for _, s, _ in found)) / 1e3 / args.steps
    print(f"{busy_ms:.1f} ms of kernels in {span_ms:.1f} ms a step; ms a step, calls a step, us a call:")
    for name, duration in total.most_common(args.top):
        print(f"{duration / 1e3 / args.steps:8.2f} {count[name] / args.steps:7.1f} {duration / count[name]:9.1f}  {name[:100]}")


if __name__ == "__main__":
    main()
