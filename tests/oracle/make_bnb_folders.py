"""Has transformers and bitsandbytes quantise a folder in four ways and save it. Run by the oracle's Python.

    python make_bnb_folders.py BASE FOLDER

FOLDER/nf4, nf4-double, fp4 and fp4-double get what save_pretrained writes, and expected.json: the SHA-256 of the bytes of every
weight as bitsandbytes dequantises it, zeros without their sign.
"""

import hashlib
import json
import pathlib
import sys

import bitsandbytes
import torch
import transformers


def main(base: str, folder: str) -> None:
    for kind in ("nf4", "fp4"):
        for double in (False, True):
            target = pathlib.Path(folder) / (f"{kind}-double" if double else kind)
            config = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.bfloat16
            )
            model = transformers.AutoModelForCausalLM.from_pretrained(
                base, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
            )
            model.save_pretrained(target)
            hashes = {}
            for name, module in model.named_modules():
                if isinstance(module, bitsandbytes.nn.Linear4bit):
                    # Its kernels for CPUs with AVX-512 and without it disagree about the sign of fp4's second zero.
                    weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state) + 0.0
                    hashes[name] = hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            assert len(hashes) == 14, "seven Linears in each of two layers"
            (target / "expected.json").write_text(json.dumps(hashes, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
