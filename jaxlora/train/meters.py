"""What the progress bar and the log show besides the loss."""

import collections

import jax
import rich

GIB = 2**30


def peak_gib() -> float | None:
    """Peak device memory in use so far, in GiB, over this process's devices; None where the backend does not count it (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return max(peaks) / GIB if peaks else None


def shows_bars() -> bool:
    """Whether the output is a terminal or a notebook; elsewhere a progress bar leaves blank lines."""
    console = rich.get_console()
    return console.is_terminal or console.is_jupyter


class Throughput:
    """Tokens per second over the last steps; the first step is left out, since it compiles."""

    def __init__(self, window: int = 20):
        self._marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=window + 1)
        self._total = 0

    def add(self, tokens: int, at: float) -> None:
        """Counts the tokens (padding excluded) of a step that ended at that second."""
        self._total += tokens if self._marks else 0
        self._marks.append((at, self._total))

    def read(self) -> float | None:
        """Tokens per second, or None before the second step."""
        if len(self._marks) < 2:
            return None
        (then, before), (now, after) = self._marks[0], self._marks[-1]
        return (after - before) / (now - then)
