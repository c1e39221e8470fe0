"""Ours and the rivals on one machine in one call: ``python -m benchmarks.versus 8b --checkpoints /tmp/checkpoints``.

Each run is a process of its own, in turn: ours, a rival, ours, the next rival. Prints the ratio of the medians, with the memory beside it,
and whether it is what the job asks for. Our second run finds the compilation cache that the first one left, which times the first step
with and without it (``--once`` leaves it out). What a rival ran for an earlier job of the call it does not run again. A rival's checkpoint
is written first where it is missing. ``benchmarks/jobs.py`` has the jobs.
"""

import argparse
import os
import pathlib
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import results
from benchmarks.jobs import JOBS, Job, Rival

ROOT = pathlib.Path(__file__).resolve().parent.parent
OURS = "benchmarks.train_step"
# A run that takes longer hangs, or is not worth the machine's time.
TIMEOUT_S = 300


def plan(rivals: Iterable[str], *, once: bool = False) -> list[str]:
    """Who runs, in turn: each rival right after a run of ours, of which there are at least two, or ``once`` ours and then the rivals.

    >>> plan(["unsloth", "hf"])
    ['ours', 'unsloth', 'ours', 'hf']
    >>> plan(["unsloth", "hf"], once=True)
    ['ours', 'unsloth', 'hf']
    """
    if once:
        return ["ours", *rivals]
    turns = [who for rival in rivals for who in ("ours", rival)]
    return turns if len(turns) > 2 else [*turns, "ours"]


def ours_command(job: Job, cache: str, more: str) -> list[str]:
    """Our run of a job; of arguments that are given twice the last counts, so ``more`` may change what the job says."""
    return [OURS, job.model, *shlex.split(job.ours), *_batch(job), "--cache", cache, *shlex.split(more)]


def rival_command(job: Job, rival: Rival, checkpoints: pathlib.Path) -> list[str]:
    """A rival's run of a job."""
    if rival.script == OURS:
        return [rival.script, job.model, *shlex.split(rival.arguments), *_batch(job)]
    return [rival.script, *shlex.split(rival.arguments), *_batch(job), "--checkpoint", str(checkpoints / job.model)]


def _batch(job: Job) -> list[str]:
    return ["--rows", str(job.rows), "--sequence", str(job.sequence), "--rank", str(job.rank)]


def execute(command: Sequence[str], *, path: str = "") -> dict[str, Any]:
    """Runs a module in a process of its own and a folder of its own, ``path`` first on its PYTHONPATH; its RESULT row.

    Raises:
      RuntimeError: it failed; the end of what it printed is in the text.
      subprocess.TimeoutExpired: it took more than ``TIMEOUT_S``.
    """
    paths = [path, str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    print("+", *command, flush=True)
    # Unsloth writes compiled files into the folder that it is started in.
    with tempfile.TemporaryDirectory() as folder:
        how: dict[str, Any] = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "timeout": TIMEOUT_S}
        done = subprocess.run([sys.executable, "-m", *command], cwd=folder, env=environment, **how)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return results.parse_result(done.stdout)


def same_work(job: Job, row: dict[str, Any]) -> dict[str, Any]:
    """The row.

    Raises:
      ValueError: it is of another model, batch or rank than the job's, and fit for no ratio.
    """
    wanted, ran = (job.model, job.rows, job.sequence, job.rank), tuple(row[key] for key in ("model", "rows", "sequence", "rank"))
    if ran != wanted:
        raise ValueError(f"no ratio between different work: the job is {wanted}, the run was {ran}")
    return row


def step_s(row: dict[str, Any]) -> float:
    """The median step of a RESULT row, ours or a rival's."""
    return row["step_s"] if "step_s" in row else row["step_ms"] / 1e3


def compare(job: Job, name: str, ours: Sequence[dict[str, Any]], theirs: dict[str, Any]) -> dict[str, Any]:
    """One row: our median step beside a rival's, their ratio, our memory beside the limit, and whether the job is met."""
    rival = job.rivals[name]
    mine, peak = statistics.median(map(step_s, ours)), max(row["peak_gb"] for row in ours)
    ratio, fits = step_s(theirs) / mine, job.limit_gb is None or peak <= job.limit_gb
    return {
        "model": job.model, "rows": job.rows, "sequence": job.sequence, "rank": job.rank, "remat": ours[0]["remat"],
        "weights": ours[0]["weights"], "step_s": round(mine, 4), "tok_s": round(job.rows * job.sequence / mine), "peak_gb": peak,
        "limit_gb": "" if job.limit_gb is None else job.limit_gb, "fits": fits, "rival": name, "rival_arguments": rival.arguments,
        "rival_weights": theirs["weights"] if "weights" in theirs else f"{theirs['bits']} bits",
        "rival_step_s": round(step_s(theirs), 4), "rival_tok_s": theirs["tok_s"], "rival_peak_gb": theirs["peak_gb"],
        "ratio": round(ratio, 3), "must": rival.must, "stretch": rival.stretch or "", "met": fits and ratio >= rival.must,
        "stretch_met": fits and rival.stretch is not None and ratio >= rival.stretch,
    }  # fmt: skip


def describe(row: dict[str, Any], first_steps: Sequence[float]) -> str:
    """What is printed of a comparison."""
    limit = f" (limit {row['limit_gb']}: {'ok' if row['fits'] else 'OVER'})" if row["limit_gb"] != "" else ""
    steps = ", ".join(f"{s:.1f}" for s in first_steps)
    theirs = f"{row['rival_step_s']:.4f} s, {row['rival_tok_s']:,} tok/s, {row['rival_peak_gb']} GB"
    lines = [
        f"{row['job']}: {row['model']}, {row['rows']} x {row['sequence']}, r {row['rank']}",
        f"  ours     {row['weights']}, remat {row['remat']}: {row['step_s']:.4f} s, {row['tok_s']:,} tok/s, {row['peak_gb']} GB{limit}; "
        f"first steps {steps} s",
        f"  {row['rival']:8} {row['rival_weights']}, {row['rival_arguments']}: {theirs}",
        f"  ratio {row['ratio']:.3f}; must {row['must']}: {'met' if row['met'] else 'NOT MET'}"
        + (f"; stretch {row['stretch']}: {'met' if row['stretch_met'] else 'not met'}" if row["stretch"] else ""),
    ]
    return "\n".join(lines)


def run(name: str, args: argparse.Namespace, known: dict[tuple[str, ...], dict[str, Any]]) -> bool:
    """Runs one job, prints and records its ratios; whether each rival's "must" is met. ``known`` are the rivals' rows by their commands."""
    rivals = [r for r in JOBS[name].rivals if not args.rivals or r in args.rivals]
    ran: dict[str, list[dict[str, Any]]] = {}
    try:
        for who, row in take_turns(name, rivals, args, known):
            ran.setdefault(who, []).append(row)
    finally:
        # Stopped in the middle, it still tells what it knows.
        met = [report(name, rival, args, ran) for rival in rivals]
    return all(met)


def report(name: str, rival: str, args: argparse.Namespace, ran: Mapping[str, Sequence[dict[str, Any]]]) -> bool:
    """Prints and records the ratio to one rival, where both have run; whether its "must" is met."""
    if "ours" not in ran or rival not in ran:
        print(f"{name}: no ratio to {rival}, since a run failed or was not reached", flush=True)
        return False
    ours, (theirs,) = ran["ours"], ran[rival]
    row = {"job": name, **compare(JOBS[name], rival, ours, theirs), **_where(ours[0])}
    print(describe(row, [o["first_step_s"] for o in ours]), flush=True)
    results.print_result(row)
    record(args, "versus.csv", row)
    return row["met"]


def take_turns(
    name: str, rivals: Sequence[str], args: argparse.Namespace, known: dict[tuple[str, ...], dict[str, Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(who ran, the row), each recorded. A run that fails is told, and is no reason to lose the others. A rival that is ``known`` to have
    run before is not run again."""
    job, commit = JOBS[name], {"commit": args.commit or results.head()}
    with tempfile.TemporaryDirectory() as cache:
        for who in plan(rivals, once=args.once):
            script = OURS if who == "ours" else job.rivals[who].script
            command = ours_command(job, cache, args.ours) if who == "ours" else rival_command(job, job.rivals[who], args.checkpoints)
            if tuple(command) in known:
                yield who, known[tuple(command)]
                continue
            try:
                if script != OURS:
                    write_checkpoint(job.model, args.checkpoints)
                row = same_work(job, execute(command, path="" if who == "ours" else args.rival_path) | commit)
            except (RuntimeError, ValueError, subprocess.SubprocessError) as error:
                print(f"{name}, {who}: {error}", flush=True)
                continue
            record(args, "train_step.csv" if script == OURS else "rivals.csv", row)
            if who != "ours":
                known[tuple(command)] = row
            yield who, row


def write_checkpoint(model: str, checkpoints: pathlib.Path) -> None:
    """Writes a rival's checkpoint where there is none."""
    if not (checkpoints / model / "config.json").exists():
        subprocess.run([sys.executable, "-m", "benchmarks.make_checkpoint", model, str(checkpoints / model)], cwd=ROOT, check=True)


def record(args: argparse.Namespace, file: str, row: dict[str, Any]) -> None:
    """Appends a row to a CSV, where a folder was named."""
    if args.csv:
        args.csv.mkdir(parents=True, exist_ok=True)
        results.append(args.csv / file, row)


def _where(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("device", "date", "commit", "jax")}


def main() -> int:
    """Runs the jobs; 1 where one of them is not met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="+", choices=JOBS, metavar="JOB", help=", ".join(JOBS))
    parser.add_argument("--checkpoints", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "checkpoints")
    parser.add_argument("--rivals", nargs="+", default=[], help="only these")
    parser.add_argument("--once", action="store_true", help="one run of ours a job")
    parser.add_argument("--rival-path", default="", help="a folder with the rivals' packages, for their processes alone")
    parser.add_argument("--ours", default="", help='more arguments for our runs, such as "--remat True"')
    parser.add_argument("--csv", type=pathlib.Path, help="append all rows to the CSVs of this folder")
    parser.add_argument("--commit", default="", help="what was measured, where git cannot say")
    args = parser.parse_args()
    idle = [name for name in args.jobs if args.rivals and not set(args.rivals) & set(JOBS[name].rivals)]
    if idle:
        parser.error(f"none of {args.rivals} is a rival of {', '.join(f'{name} ({", ".join(JOBS[name].rivals)})' for name in idle)}")
    # Else it would end at once, and tell nothing.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    # Every run has a folder of its own.
    args.checkpoints, args.rival_path = args.checkpoints.absolute(), args.rival_path and os.path.abspath(args.rival_path)
    known: dict[tuple[str, ...], dict[str, Any]] = {}
    return 0 if all([run(name, args, known) for name in args.jobs]) else 1


if __name__ == "__main__":
    sys.exit(main())
