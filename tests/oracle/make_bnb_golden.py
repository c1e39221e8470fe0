"""Writes tests/golden/bnb: weights that bitsandbytes quantised, serialised and dequantised on CPU.

Run from the repository root, in the oracle's environment: python tests/oracle/make_bnb_golden.py
"""

import pathlib

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file

SHAPE = (10, 64)  # 10 blocks; in is a multiple of 64, for other sizes bitsandbytes' CPU kernel is wrong
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def main() -> None:
    folder = pathlib.Path(__file__).parents[1] / "golden" / "bnb"
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for label, dtype in DTYPES.items():
        w = torch.randn(SHAPE, generator=generator).to(dtype)
        w[3, :64] = 0
        tensors = {"w": w}
        for kind in ("nf4", "fp4"):
            for nested in (False, True):
                name = f"{kind}{'.double' if nested else ''}"
                storage = torch.bfloat16 if (kind, nested) == ("fp4", True) else torch.uint8
                codes, state = bnb.quantize_4bit(w, compress_statistics=nested, quant_type=kind, quant_storage=storage)
                tensors[f"{name}.weight"] = codes
                for suffix, part in state.as_dict(packed=True).items():
                    tensors[f"{name}.weight.{suffix}"] = part
                tensors[f"{name}.dequantised"] = bnb.dequantize_4bit(codes, state)
        rows, absmax, _ = bnb.int8_vectorwise_quant(w.to(torch.float16))
        tensors |= {"int8.weight": rows, "int8.SCB": absmax, "int8.dequantised": bnb.int8_vectorwise_dequant(rows, absmax)}
        save_file({k: v.clone().contiguous() for k, v in tensors.items()}, folder / f"{label}.safetensors", {"format": "pt"})
    # Large enough for more than one nested block of 256.
    w = torch.randn((65, 256), generator=generator).to(torch.bfloat16)
    codes, state = bnb.quantize_4bit(w, compress_statistics=True, quant_type="nf4")
    tensors = {"weight": codes} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    save_file({"w": w} | {k: v.clone() for k, v in tensors.items()}, folder / "long.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
