"""No speed without a green gate: runs the tests marked gpu, and the commands only where all passed.

    python -m benchmarks.gate -- -m benchmarks.kernels -- -m benchmarks.versus 8b

Each ``--`` begins the arguments of one Python. Before the first, paths of tests may narrow the gate; an empty run is a red one.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent


def split(arguments: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """(paths of tests, commands).

    >>> split(["tests", "--", "-m", "a", "--", "b.py"])
    (['tests'], [['-m', 'a'], ['b.py']])
    """
    groups: list[list[str]] = [[]]
    for argument in arguments:
        if argument == "--":
            groups.append([])
        else:
            groups[-1].append(argument)
    return groups[0], [group for group in groups[1:] if group]


def verdict(status: int, report: pathlib.Path) -> tuple[int, str | None]:
    """(tests that passed, why the gate stays shut or None) of a pytest run that wrote a JUnit report."""
    if not report.exists():
        return 0, f"pytest ended with {status} and wrote no report"
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failed, skipped = (
        sum(int(s.get(k, 0)) for s in suites for k in keys) for keys in (("tests",), ("failures", "errors"), ("skipped",))
    )
    passed = total - failed - skipped
    if failed or status not in (0, 5):
        return passed, f"{failed} of {total} GPU tests failed (pytest ended with {status})"
    if skipped:
        return passed, f"{skipped} of {total} GPU tests were skipped, and show nothing"
    return passed, None if passed else "no GPU test ran"


def shut(paths: Sequence[str]) -> str | None:
    """Runs the GPU tests; why no speed may be printed, or None."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", *paths]
        status = subprocess.run(command, cwd=ROOT, env={**os.environ, "JAXLORA_TEST_GPU": "1"}).returncode
        passed, reason = verdict(status, report)
    print(f"gate: {reason}" if reason else f"gate: {passed} GPU tests passed", flush=True)
    return reason


def main(arguments: Sequence[str]) -> int:
    """The exit status: that of the first command that failed; 1 where the gate stayed shut."""
    paths, commands = split(arguments)
    if not commands:
        print(__doc__)
        return 2
    if shut(paths):
        return 1
    statuses = [subprocess.run([sys.executable, *command], cwd=ROOT).returncode for command in commands]
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
