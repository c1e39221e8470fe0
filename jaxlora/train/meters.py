"""What the progress bar and the log show besides the loss."""

import time

import jax

GIB = 2**30


def peak_gib() -> float | None:
    """Peak device memory in use so far, in GiB, over this process's devices; None where the backend does not count it (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return max(peaks) / GIB if peaks else None


class Throughput:
    """Tokens per second over the steps since the last reading; the first step (it compiles) is left out."""

    def __init__(self):
        self._since: float | None = None
        self._tokens = 0

    def add(self, tokens: int) -> None:
        """Counts a finished step's tokens (padding excluded)."""
        if self._since is None:
            self._since = time.perf_counter()
        else:
            self._tokens += tokens

    def read(self) -> float | None:
        """Tokens per second since the last reading, or None before there is one."""
        if self._since is None or not self._tokens:
            return None
        now = time.perf_counter()
        rate = self._tokens / (now - self._since)
        self._since, self._tokens = now, 0
        return rate
