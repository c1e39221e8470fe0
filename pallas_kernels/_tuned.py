"""Measured configurations: ``tuned/<device>.json``, made by ``python -m benchmarks.tune``; nothing is tuned at call time.

``{kernel: {"fastest": backend, backend: {"M x K x N": {"config": {…}, "ms": …, "date": …}}}}``
"""

import functools
import importlib.resources
import json
from collections.abc import Callable
from typing import Any

import jax


@functools.cache
def _table(device: str) -> dict[str, Any]:
    file = importlib.resources.files("pallas_kernels") / "tuned" / f"{device}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _here() -> dict[str, Any]:
    return _table(jax.devices()[0].device_kind) if jax.default_backend() == "gpu" else {}


def fastest(kernel: str) -> str | None:
    """The backend that was fastest for this kernel on this device; None: nobody measured."""
    return _here().get(kernel, {}).get("fastest")


def config[T](kernel: str, backend: str, kind: Callable[..., T], sizes: tuple[int, ...]) -> T:
    """The measured configuration for those sizes, or for the nearest ones that were measured; else the default."""
    measured = _here().get(kernel, {}).get(backend, {})
    if not measured:
        return kind()

    def distance(key: str) -> float:
        return sum(abs(a.bit_length() - b.bit_length()) for a, b in zip(map(int, key.split(" x ")), sizes, strict=True))

    return kind(**measured[min(measured, key=distance)]["config"])
