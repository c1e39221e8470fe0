"""Runs the Triton kernels of pallas_kernels in Triton's interpreter, on a CPU: ``run_triton.py CALLS.npz RESULTS.npz``.

CALLS.npz has, for each call, ``<call>/<argument>`` in the order of the kernel's arguments and ``<call>`` itself: a JSON of the kernel's
name, its constants, the numbers of arguments and of programs and the shapes of its outputs and whether they are words, which start as
NaN (each of a word's four e4m3 numbers) so that what is not written shows.
"""

import importlib
import json
import os
import pathlib
import sys
import types

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

MODULES = ("triton_code", "float8_triton_code")


def main(calls: str, results: str) -> None:
    # The package without its __init__, which imports JAX.
    package = types.ModuleType("pallas_kernels")
    package.__path__ = [str(pathlib.Path(__file__).parents[2] / "pallas_kernels")]
    sys.modules["pallas_kernels"] = package
    code = {}
    for name in MODULES:
        code |= vars(importlib.import_module(f"pallas_kernels.{name}"))
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
