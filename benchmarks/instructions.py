"""How many instructions Triton's kernels take for an element, without a GPU: ``python -m benchmarks.instructions [NAME …]``.

The memory leaves a pass over wide activations some 8 instructions for each byte that it moves (128 lanes of 132 SMs at 1.5 GHz, 3 TB/s: an
H100), of which perhaps half can be issued: what takes more is not bound by the memory. Compiles each call of
`benchmarks.kernel_sizes` for sm90 and counts what its longest loop, or where there is none all of it, takes for one element of a block; of
a matrix product, for one step along the contracted axis.
Needs triton and jax_triton, whose wheels come with cuobjdump.
"""

import argparse
import collections
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import jax

from benchmarks import results
from benchmarks.absent_gpu import pretended
from benchmarks.kernel_sizes import SIZES, Size
from pallas_kernels import KERNELS, _triton

_TYPES = {"bfloat16": "bf16", "float32": "fp32", "float8_e4m3fn": "fp8e4nv", "uint8": "u8", "uint32": "u32", "int32": "i32"}
_LINE = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);")


@dataclasses.dataclass(frozen=True)
class Launch:
    """What a backend would launch: a device function, its arguments and outputs, its constants."""

    kernel: Any
    arguments: Sequence[Any]
    constants: Mapping[str, Any]


def main() -> None:
    known = [name for name in SIZES if "triton" in KERNELS[name].backends]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"kernels, all without; of {', '.join(known)}")
    names = parser.parse_args().names or known
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no Triton kernel is called {', '.join(unknown)}; there are {', '.join(known)}")
    for name in names:
        for label, size in SIZES[name].items():
            for launch in launches(name, size):
                sass, registers = compiled(launch)
                row = {"kernel": name, "size": label, "function": launch.kernel.fn.__name__, "registers": registers}
                results.print_result(row | counted(sass, elements(launch.constants)))


def launches(name: str, size: Size) -> list[Launch]:
    """What the Triton backend of a kernel would launch for a call."""
    found, statics = [], []

    def record(kernel: Any, *arguments: Any, out: Any, grid: Any, config: Mapping[str, int], in_place: Any = None, **constants: Any) -> Any:
        found.append(Launch(kernel, [*arguments, *jax.tree.leaves(out)], {**config, **constants}))
        return jax.tree.map(lambda like: jax.numpy.zeros(like.shape, like.dtype), out)

    def arrays(key: Any) -> Any:
        statics.append(size.case(key).static)
        return size.case(key).arrays

    made = jax.eval_shape(arrays, jax.random.key(0))
    with pretended(), mock.patch.object(_triton, "call", record):
        jax.eval_shape(lambda arrays: KERNELS[name].backends["triton"](**arrays, **statics[0]), made)
    return found


def elements(constants: Mapping[str, Any]) -> float:
    """Of a block, for each thread: rows times columns, or the columns of all arrays where a row is one block of each."""
    blocks = [value for name, value in constants.items() if name in ("BLOCK_N", "BLOCK_X", "BLOCK_Y", "BLOCK_Z") and value > 1]
    return constants.get("BLOCK_M", 1) * sum(blocks) / (32 * constants["num_warps"])


def compiled(launch: Launch) -> tuple[str, int]:
    """The launch's SASS for sm90, and its registers a thread."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    names, constants = launch.kernel.arg_names, dict(launch.constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    arrays = [name for name in names if name not in constants]
    types = ["i32" if isinstance(a, int) else f"*{_TYPES[a.dtype.name]}" for a in launch.arguments]
    source = ASTSource(
        launch.kernel,
        signature={**dict.fromkeys(names, "constexpr"), **dict(zip(arrays, types, strict=True))},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # As jax-triton has it: arrays are aligned.
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name, kind in zip(arrays, types, strict=True) if kind[0] == "*"},
    )
    cubin = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        text = subprocess.run(dump, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    return text, int(re.findall(r"REG:(\d+)", text)[0])


def counted(sass: str, per_thread: float) -> dict[str, Any]:
    """Instructions an element, and the commonest ones.

    >>> text = "/*0000*/ MOV R1, R2; /*0010*/ @P0 FMUL R3, R1, R1; /*0020*/ @P1 BRA 0x10; /*0030*/ EXIT;"
    >>> counted(text, 2)
    {'instructions': 1.0, 'of which': 'FMUL 0.5, BRA 0.5'}
    """
    body = longest_loop([(int(place, 16), text) for place, text in _LINE.findall(sass)])
    kinds = collections.Counter(re.sub(r"^@!?U?PT?\d*\s+", "", text).split()[0].split(".")[0] for text in body)
    del kinds["NOP"]
    common = ", ".join(f"{kind} {count / per_thread:.1f}" for kind, count in kinds.most_common(8))
    return {"instructions": round(kinds.total() / per_thread, 1), "of which": common}


def longest_loop(lines: Sequence[tuple[int, str]]) -> list[str]:
    """What is between a branch back and its target, of the longest such; all, where no branch goes back."""
    back = [(place, int(to[1], 16)) for place, text in lines if (to := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text))]
    loops = [(target, place) for place, target in back if target < place]
    first, last = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, lines[-1][0]))
    return [text for place, text in lines if first <= place <= last]


if __name__ == "__main__":
    sys.exit(main())
