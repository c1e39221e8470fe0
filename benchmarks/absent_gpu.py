"""A step compiled for an H200 that is not there: ``python -m benchmarks.absent_gpu llama-3.1-8b --remat dots``.

XLA's compiler needs no GPU, only the description of one (`h200.txtpb`). Takes the arguments of `benchmarks.train_step`; prints a RESULT
line with the memory that the step needs, and what the kernels of each loop read and write in a layer, largest first. Nothing is tried
out, so cuBLAS's algorithms are not the best ones, and cuDNN's workspaces count as nothing.

Needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt of jax's own version (``pip install --no-deps``, 170 MB), and CUDA's ptxas and
libdevice in the folder $CUDA_HOME, else /usr/local/cuda.
"""

import collections
import contextlib
import math
import os
import pathlib
import re
import time
from collections.abc import Iterator
from unittest import mock

import jax
from jax.experimental import topologies

from benchmarks import results, train_step
from benchmarks.geometries import GEOMETRIES, text_layers, with_layers
from jaxlora.nn import host
from jaxlora.train.auto import needed_gib
from jaxlora.train.meters import GIB
from pallas_kernels import _kernel
from pallas_kernels.attention import cudnn

TARGET = pathlib.Path(__file__).with_name("h200.txtpb")
# What JAX takes of the card's, unless told otherwise.
MEMORY_BYTES = 150_754_820_096 * 3 // 4
# Of the host that it is in.
HOST_BYTES = 128 << 30
_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
_SHAPE = re.compile(rf"\b({'|'.join(_ITEM_BYTES)})\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_FREE = {"get-tuple-element", "bitcast", "tuple", "parameter", "constant", "while"}


def placement() -> jax.sharding.Sharding:
    """Where abstract arrays lie, for the compiler to take the H200 for their device."""
    devices = topologies.get_topology_desc("", "cuda", target_config=TARGET.read_text(), topology="1x1x1").devices
    return jax.sharding.SingleDeviceSharding(devices[0])


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Has our own code choose as it would on an H200."""
    here = _kernel.Device("gpu", (9, 0), MEMORY_BYTES)
    with (
        mock.patch.object(jax, "default_backend", lambda: "gpu"),
        mock.patch.object(_kernel, "device", lambda: here),
        mock.patch.object(host, "memory_bytes", lambda: HOST_BYTES),
        # What it checks, it would have to run.
        mock.patch.object(cudnn, "check_packing"),
    ):
        yield


def nbytes(shapes: str, layers: int = 1) -> float:
    """Bytes of all arrays in a piece of HLO; of what is stacked by layer, one layer's.

    >>> nbytes("(bf16[8,4]{1,0}, f32[2]{0})"), nbytes("bf16[32,8,4]{2,1,0}", layers=32)
    (72.0, 64.0)
    """
    total = 0.0
    for dtype, dims in _SHAPE.findall(shapes):
        sizes = [int(d) for d in dims.split(",") if d]
        total += _ITEM_BYTES[dtype] * math.prod(sizes[1:] if layers > 1 and sizes[:1] == [layers] else sizes)
    return total


def traffic(hlo: str, layers: int) -> dict[str, list[tuple[float, str, str]]]:
    """By loop body: (MB read and written in a layer, kind, shape of the result) of each kernel that runs in turn."""
    found: dict[str, list[tuple[float, str, str]]] = {}
    for body in re.split(r"\n(?=%|ENTRY)", hlo):
        name = body.split(" ", 1)[0].lstrip("%")
        shapes: dict[str, str] = {}
        rows = []
        for match in map(_INSTRUCTION.match, body.split("\n")[1:]):
            if match is None:
                continue
            result, shape, kind, rest = match.groups()
            shapes[result] = shape
            # What is started and awaited moves beside the rest.
            if kind in _FREE or kind.endswith(("-start", "-done")):
                continue
            # An array that a kernel gets twice is read once.
            operands = [shapes.get(operand, "") for operand in dict.fromkeys(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))]
            target = re.search(r'custom_call_target="([^"]*)"', rest)
            # The workspace of a product is no traffic.
            moved = nbytes(shape.split(", s8[")[0], layers) + sum(nbytes(operand, layers) for operand in operands)
            rows.append((moved / 1e6, target[1] if target else kind, shape.split(", s8[")[0].lstrip("(")))
        if any(kind.startswith("__cublas") for _, kind, _ in rows):
            found[name] = sorted(rows, reverse=True)
    return found


def main() -> None:
    folder = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={folder} --xla_gpu_autotune_level=0"
    jax.config.update("jax_platforms", "cpu")
    args = train_step.parser().parse_args()
    config = with_layers(GEOMETRIES[args.model], args.layers)
    with pretended():
        lowered, _, _ = train_step.lower_abstract(config, args, placement())
        started = time.perf_counter()
        compiled = lowered.compile()
    memory = compiled.memory_analysis()
    row = {"needed_gb": needed_gib(compiled) * GIB / train_step.GB, "temp_gb": memory.temp_size_in_bytes / train_step.GB}
    row |= {"host_temp_gb": memory.host_temp_size_in_bytes / train_step.GB, "compile_s": time.perf_counter() - started}
    results.print_result({"model": args.model, "remat": args.remat, **{key: round(value, 2) for key, value in row.items()}})
    text = compiled.as_text()
    if args.hlo:
        args.hlo.write_text(text)
    for name, kernels in traffic(text, text_layers(config)).items():
        kinds = collections.Counter({"products": 0.0, "rest": 0.0})
        for moved, kind, _ in kernels:
            kinds["products" if kind.startswith("__c") else "rest"] += moved
        print(f"{name}: {len(kernels)} kernels, products {kinds['products']:.0f} MB, rest {kinds['rest']:.0f} MB")
        for moved, kind, shape in kernels[:40]:
            print(f"  {moved:8.0f} MB  {kind:28} {shape[:70]}")


if __name__ == "__main__":
    main()
