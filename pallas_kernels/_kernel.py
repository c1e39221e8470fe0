"""The record that every kernel is kept in, and the visible choice of a backend."""

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels import _tuned

_LOG = logging.getLogger("pallas_kernels")


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of one call, for tests and benchmarks.

    ``call(**arrays, **static)`` for the reference, ``call(**arrays, **static, **tuning)`` for a backend: ``tuning`` holds what may change
    speed and memory but no result. ``wrt`` names the arrays whose gradients the contract covers.
    """

    arrays: Mapping[str, Any]
    static: Mapping[str, Any]
    wrt: tuple[str, ...]
    tuning: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Device:
    """Where a call will run: JAX's platform name, the CUDA compute capability where there is one, and the memory where it is known."""

    platform: str
    capability: tuple[int, int] | None = None
    memory_bytes: int | None = None

    def lacks(self, capability: tuple[int, int]) -> str | None:
        """Why this is no CUDA device of at least ``capability``, or None.

        >>> Device("cpu").lacks((9, 0))
        'needs a CUDA device of compute capability 9.0 or later, this is cpu'
        """
        if self.capability is not None and self.capability >= capability:
            return None
        here = self.platform if self.capability is None else f"{self.platform} {self.capability[0]}.{self.capability[1]}"
        return f"needs a CUDA device of compute capability {capability[0]}.{capability[1]} or later, this is {here}"


def device() -> Device:
    """The default device. Kernels ask for it as ``_kernel.device()``, so that a test can lower them for a GPU which is not there."""
    platform = jax.default_backend()
    if platform != "gpu":
        return Device(platform)
    # ROCm calls itself gpu too, and answers with a name such as gfx90a.
    here = jax.local_devices(backend="gpu")[0]
    found = re.fullmatch(r"(\d+)\.(\d+)", str(here.compute_capability))
    memory = (here.memory_stats() or {}).get("bytes_limit")
    return Device(platform, (int(found[1]), int(found[2])) if found else None, memory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One operation: what it means, and the ways to compute it.

    ``reference`` is the contract: plain JAX in f32, slow and obvious. ``backends`` are public-signature callables in the order in which
    "auto" tries them, after the one that was measured to be fastest on this device (`_tuned`). ``refuses(backend, *args, **kwargs)`` says
    why a backend cannot run this call here, or None. ``cases`` are factories ``dtype -> Case``. ``tolerance`` is the largest relative error
    (Frobenius norm, against the reference on the same inputs) by dtype name.
    """

    name: str
    reference: Callable[..., Any]
    backends: Mapping[str, Callable[..., Any]]
    refuses: Callable[..., str | None]
    cases: Mapping[str, Callable[[Any], Case]]
    tolerance: Mapping[str, float]

    def choose(self, backend: str, *args: Any, **kwargs: Any) -> str:
        """The backend to run: the named one, or with "auto" the first that does not refuse (each refusal is logged once).

        Raises:
          ValueError: nobody knows that name.
          NotImplementedError: the named backend, or with "auto" every backend, refuses; the text says why.
        """
        if backend == "auto":
            reasons = []
            measured = _tuned.fastest(self.name)
            for name in sorted(self.backends, key=lambda name: name != measured):
                reason = self.refuses(name, *args, **kwargs)
                if reason is None:
                    for told in reasons:
                        _log_fallback(self.name, name, told)
                    return name
                reasons.append(f"{name}: {reason}")
            raise NotImplementedError(f"no backend of {self.name} can run this call: {'; '.join(reasons)}")
        if backend not in self.backends:
            raise ValueError(f"{self.name} has no backend {backend!r}; known are 'auto', {', '.join(map(repr, self.backends))}")
        reason = self.refuses(backend, *args, **kwargs)
        if reason is not None:
            raise NotImplementedError(f"backend {backend!r} of {self.name} cannot run this call: {reason}")
        return backend


@functools.cache
def _log_fallback(kernel: str, chosen: str, reason: str) -> None:
    # Without a GPU the fallback is the expected path.
    level = logging.WARNING if jax.default_backend() == "gpu" else logging.INFO
    _LOG.log(level, "%s runs on %r; %s", kernel, chosen, reason)
