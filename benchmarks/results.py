"""One way into and out of ``benchmarks/results/*.csv``; standard library only, since the rivals' scripts use it too."""

import csv
import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

FOLDER = pathlib.Path(__file__).resolve().parent / "results"
RESULT = "RESULT "


def print_result(row: Mapping[str, Any]) -> None:
    """The line by which a benchmark tells its result to whoever started it."""
    print(RESULT + json.dumps(row), flush=True)


def parse_result(output: str) -> dict[str, Any]:
    """The row of the last RESULT line of a program's output.

    >>> parse_result('loading\\nRESULT {"step_s": 0.5}\\n')
    {'step_s': 0.5}

    Raises:
      ValueError: there is none; the end of the output is in the text.
    """
    lines = [line for line in output.splitlines() if line.startswith(RESULT)]
    if not lines:
        raise ValueError(f"no RESULT line in the output, which ends with:\n{output[-2000:]}")
    return json.loads(lines[-1].removeprefix(RESULT))


def provenance(device: str, packages: Sequence[str], commit: str = "") -> dict[str, str]:
    """Where and when a figure was measured, and with what: device, date, commit, and the version of each package ("" where absent).

    ``commit`` is for a tree without git, which cannot be asked.
    """
    return {"device": device, "date": datetime.date.today().isoformat(), "commit": commit or head(), **{p: _version(p) for p in packages}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def head() -> str:
    """The commit of this tree, "" where there is no git."""
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=FOLDER, capture_output=True, text=True)
    except OSError:
        return ""
    return found.stdout.strip()


def read(path: str | os.PathLike) -> list[dict[str, str]]:
    """The rows of a file, oldest first; none where there is no file. A row that is older than a column has "" there."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file, restval=""))


def append(path: str | os.PathLike, row: Mapping[str, Any]) -> None:
    """Adds a row, and the columns that the file lacks; a list becomes its members with spaces between. Older rows keep what they say."""
    path, rows = pathlib.Path(path), read(path)
    new = {key: " ".join(map(str, value)) if isinstance(value, list | tuple) else value for key, value in row.items()}
    columns = dict.fromkeys([*(rows[0] if rows else []), *new])
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, new])
    os.replace(temporary, path)
