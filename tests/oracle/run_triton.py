"""Runs the Triton kernels of pallas_kernels in Triton's interpreter, on a CPU: ``run_triton.py CALLS.npz RESULTS.npz``.

CALLS.npz has, for each call, ``<call>/<argument>`` in the order of the kernel's arguments and ``<call>`` itself: a JSON of the kernel's
name, its constants, the numbers of arguments and of programs and the shapes of its outputs and whether they are words, which start as
NaN (each of a word's four e4m3 numbers) so that what is not written shows.
"""

import functools
import importlib
import json
import operator
import os
import pathlib
import sys
import types

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

MODULES = ("triton_code", "weight_triton_code", "row_triton_code", "float8_triton_code")


def permuted(low, high, selector):
    """What `float8_triton_code.permuted` has the GPU's prmt do, which the interpreter has not."""
    # A tensor of its own, of the shape that they have together.
    out = functools.reduce(operator.or_, (word for word in (low, high, selector) if hasattr(word, "handle"))) | 0
    words = [word.handle.data if hasattr(word, "handle") else np.array(int(word)) for word in (low, high, selector)]
    low, high, selector = (np.broadcast_to(word.astype("<u4"), out.handle.data.shape) for word in words)
    of_both = np.ascontiguousarray(np.stack([low, high], axis=-1)).view(np.uint8)
    places = (selector[..., None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
    found = np.take_along_axis(of_both, (places & 7).astype(np.int64), axis=-1)
    found = np.where(places > 7, np.where(found > 127, 255, 0), found).astype(np.uint8)
    out.handle.data = found.view("<u4")[..., 0]
    return out


def main(calls: str, results: str) -> None:
    # The package without its __init__, which imports JAX.
    package = types.ModuleType("pallas_kernels")
    package.__path__ = [str(pathlib.Path(__file__).parents[2] / "pallas_kernels")]
    sys.modules["pallas_kernels"] = package
    code = {}
    for name in MODULES:
        code |= vars(importlib.import_module(f"pallas_kernels.{name}"))
    importlib.import_module("pallas_kernels.float8_triton_code").permuted = permuted
    made = {}
    with np.load(calls) as file:
        for name in (name for name in file.files if "/" not in name):
            call = json.loads(str(file[name]))
            given = [file[f"{name}/{i}"] for i in range(call["arguments"])]
            arguments = [torch.from_numpy(value.copy()) if value.ndim else value.item() for value in given]
            outputs = [
                torch.full(shape, -1, dtype=torch.int32) if words else torch.full(shape, float("nan")) for shape, words in call["outputs"]
            ]
            code[call["kernel"]][(call["programs"],)](*arguments, *outputs, **call["constants"])
            made |= {f"{name}/{i}": out.numpy() for i, out in enumerate(outputs)}
    np.savez(results, **made)


if __name__ == "__main__":
    main(*sys.argv[1:])
