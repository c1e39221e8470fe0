"""One error for many faults, with the nearest known names; this package's own, since it may not import jaxlora."""

import difflib
import heapq
from collections.abc import Callable, Iterable, Sequence

MOST = 20


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ``'; did you mean …?'`` for the known names closest to ``name``, or an empty string.

    >>> nearest("hidden_sise", ["hidden_size", "vocab_size"])
    "; did you mean 'hidden_size'?"
    """
    parts, few = set(name.split(".")), list(known)
    # Comparing letters is slow: of a large model's tensors, only those that share most segments.
    if len(few) > 500:
        few = heapq.nlargest(50, few, key=lambda k: len(parts.intersection(k.split("."))))
    close = difflib.get_close_matches(name, few, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def describe(names: Sequence[str], line: Callable[[str], str]) -> list[str]:
    """Returns ``line(name)`` for the first names and a count of the others, so that a line may be costly to make.

    >>> describe(["a", "b"], lambda name: f"{name}: missing")
    ['a: missing', 'b: missing']
    """
    return [line(name) for name in names[:MOST]] + ([f"… and {len(names) - MOST} more of these"] if len(names) > MOST else [])


def raise_all(what: str, faults: Sequence[str], *, kind: type[Exception] = ValueError) -> None:
    """Raises one error that lists every fault, or returns if there is none.

    >>> raise_all("2 tensors are wrong", ["a: missing", "b: shape"])
    Traceback (most recent call last):
        ...
    ValueError: 2 tensors are wrong:
      - a: missing
      - b: shape
    """
    if faults:
        raise kind("\n".join([f"{what}:", *(f"  - {fault}" for fault in faults)]))
