"""What the quickstart shows: one table and two pictures."""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxlora.recipes.digits import WORDS, Scans, as_written, inverted_and_turned
from jaxlora.typing import Int

_RIGHT, _WRONG = "#1a7f37", "#cf222e"
_SMOOTHED = 15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """Tokens and texts that a model gave for one domain, and which of them are right."""

    tokens: Int[np.ndarray, "N T"]
    texts: list[str]
    right: list[bool]

    @property
    def accuracy(self) -> float:
        """The part that is right.

        >>> Answers(tokens=np.zeros((4, 1), int), texts=["one"] * 4, right=[True, True, True, False]).accuracy
        0.75
        """
        return float(np.mean(self.right))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A line of the table. ``differing``: how many of its answers are not token for token those of ``compared_to``."""

    name: str
    old: Answers
    new: Answers
    compared_to: str | None = None
    differing: int = 0

    @property
    def asked(self) -> int:
        """Answers in both domains."""
        return len(self.old.texts) + len(self.new.texts)

    def compare(self, other: "Result") -> "Result":
        """The same line with its comparison to another."""
        pairs = ((self.old, other.old), (self.new, other.new))
        differing = sum(int((mine.tokens != others.tokens).any(1).sum()) for mine, others in pairs)
        return dataclasses.replace(self, compared_to=other.name, differing=differing)


def print_table(results: Sequence[Result], *, caption: str, console: Console | None = None) -> None:
    """Prints accuracies on the test scans, and how many answers are the same as those of another line."""
    scans = len(results[0].old.texts)
    table = Table(title=f"test accuracy on {scans} scans that no model was trained on", caption=caption)
    table.add_column("", justify="right")
    table.add_column("model")
    table.add_column("as written", justify="right")
    table.add_column("inverted, turned", justify="right")
    table.add_column("same tokens", justify="right")
    number = {result.name: i for i, result in enumerate(results, 1)}
    for result in results:
        same = f"{result.asked - result.differing} of {result.asked} as {number[result.compared_to]}" if result.compared_to else ""
        table.add_row(str(number[result.name]), result.name, f"{result.old.accuracy:.1%}", f"{result.new.accuracy:.1%}", same)
    (console or Console()).print(table)


def require_matplotlib() -> None:
    """Raises before the work begins.

    Raises:
      ImportError: matplotlib is missing; says what to install.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the quickstart draws with matplotlib: pip install 'jaxlora[quickstart]'")


def draw_losses(path: pathlib.Path, losses: Mapping[str, Sequence[float]]) -> None:
    """Draws the training loss of each run to a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for colour, (label, values) in enumerate(losses.items()):
        window = min(_SMOOTHED, len(values))
        means = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(range(1, len(values) + 1), values, color=f"C{colour}", alpha=0.25, linewidth=1)
        axes.plot(range(window, len(values) + 1), means, color=f"C{colour}", label=label, linewidth=2)
    axes.set_yscale("log")
    axes.set_title(f"Training loss of the three runs (bold: mean of the last {_SMOOTHED} steps)")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per answer token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def draw_answers(path: pathlib.Path, test: Scans, base: Result, adapted: Result) -> None:
    """Draws test scans with their answers to a PNG: above as written, below inverted and turned; one column a digit."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # Text below the axes is not in the layout: the last line of answers needs this room.
    figure = Figure(figsize=(13, 9.5), dpi=120, layout=ConstrainedLayoutEngine(h_pad=0.12))
    upper, lower = np.ravel(np.asarray(figure.subfigures(2, 1, height_ratios=(2, 3))))
    _draw_block(upper, "Test scans as written, with the base's answers", 2, test, as_written, [base.old])
    title = "The same digits inverted and turned: the base's answer → the adapted model's"
    _draw_block(lower, title, 3, test, inverted_and_turned, [base.new, adapted.new])
    figure.savefig(path)


def _draw_block(figure: Any, title: str, rows: int, test: Scans, domain: Callable[[Any], Any], answers: Sequence[Answers]) -> None:
    """The first scans of each digit, one column a digit."""
    figure.suptitle(title, fontsize=13)
    for axes in (grid := figure.subplots(rows, len(WORDS))).flat:
        axes.axis("off")
    for digit in range(len(WORDS)):
        for axes, scan in zip(grid[:, digit], np.flatnonzero(test.digits == digit), strict=False):
            _draw_scan(axes, domain(test.pixels[scan]), scan, answers)


def _draw_scan(axes: Any, image: Any, scan: int | np.integer, answers: Sequence[Answers]) -> None:
    """One scan and, below it, an answer a line: green where it is right, red where it is wrong."""
    axes.axis("on")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.imshow(image)
    for line, given in enumerate(answers):
        arrow = "→ " if line else ""
        axes.text(
            0.5,
            -0.06 - 0.19 * line,
            arrow + (given.texts[scan] or "(nothing)"),
            color=_RIGHT if given.right[scan] else _WRONG,
            transform=axes.transAxes,
            ha="center",
            va="top",
            fontsize=11,
        )
