"""Error texts that help: the nearest known names, and all faults of one kind in one error."""

import difflib
from collections.abc import Iterable, Sequence


def nearest(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """Returns ``'; did you mean …?'`` for the known names closest to ``name``, or an empty string.

    >>> nearest("lora_aplha", ["lora_alpha", "r"])
    "; did you mean 'lora_alpha'?"
    """
    close = difflib.get_close_matches(name, list(known), n=most, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def raise_all(what: str, faults: Sequence[str], *, kind: type[Exception] = ValueError, most: int = 20) -> None:
    """Raises one error that lists every fault (the first ``most``, then a count), or returns if there is none.

    >>> raise_all("2 tensors are wrong", ["a: missing", "b: shape"])
    Traceback (most recent call last):
        ...
    ValueError: 2 tensors are wrong:
      - a: missing
      - b: shape
    """
    if not faults:
        return
    lines = [f"  - {fault}" for fault in faults[:most]]
    if len(faults) > most:
        lines.append(f"  … and {len(faults) - most} more")
    raise kind("\n".join([f"{what}:", *lines]))
