"""Versions and devices, for the question that opens every bug report."""

import importlib.metadata
import platform
import sys

import jax

_PACKAGES = (
    "jaxlora jax jaxlib flax optax orbax-checkpoint transformers safetensors numpy ml-dtypes pillow jax-cuda13-plugin jax-triton triton "
    "nvidia-cudnn-cu13"
).split()


def describe() -> list[tuple[str, str]]:
    """Returns (name, value) of Python, the packages that matter and every device that JAX sees.

    >>> describe()[0][0]
    'python'
    """
    lines = [("python", f"{platform.python_version()} ({sys.platform}, {platform.machine()})")]
    lines += [(name, _version(name)) for name in _PACKAGES]
    for device in jax.devices():
        limit = (device.memory_stats() or {}).get("bytes_limit")
        memory = "" if limit is None else f", {limit / 2**30:.1f} GiB for JAX"
        lines.append((f"device {device.id}", f"{device.device_kind} ({device.platform}{memory})"))
    return lines


def show() -> None:
    """Prints ``describe``, one line each."""
    found = describe()
    width = max(len(name) for name, _ in found)
    for name, value in found:
        print(f"{name:{width}}  {value}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
