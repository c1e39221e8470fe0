"""Writes a tiny random Hugging Face model and what transformers computes with it. Run by the oracle's Python (torch, transformers).

    python make_reference.py CONFIG.json FOLDER

FOLDER gets config.json, model.safetensors and expected.npz: inputs, fp32 logits, the outputs of every sub-module, bf16 logits.
"""

import json
import pathlib
import re
import sys

import numpy as np
import torch
import transformers

ROWS, LENGTH = 2, 29
SUBMODULES = r"(^model(\.language_model)?\.norm|\.(layers|blocks)\.\d+(\.(self_attn|attn|mlp))?|\.merger|visual)$"


def redraw(model: torch.nn.Module, seed: int = 0) -> None:
    """Draws every parameter anew: default initialisation hides whole sub-modules (zero biases, unit norms)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, std):
        return torch.randn(shape, generator=generator) * std

    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    # Gemma's norms scale by 1 + weight.
    centred = {id(m.weight) for m in model.modules() if type(m).__name__.startswith("Gemma") and type(m).__name__.endswith("RMSNorm")}
    for name, p in model.named_parameters():
        with torch.no_grad():
            if id(p) in embeddings:
                p.copy_(normal(p.shape, 1.0))
            elif p.ndim >= 2:
                p.copy_(normal(p.shape, p[0].numel() ** -0.5))
            elif p.numel() == 1 and "gate" in name:
                sign = torch.randint(2, (1,), generator=generator) * 2 - 1
                p.copy_(sign * (torch.rand(1, generator=generator) + 0.5))
            elif name.endswith("bias"):
                p.copy_(normal(p.shape, 0.5))
            else:
                p.copy_(torch.rand(p.shape, generator=generator) + (-0.5 if id(p) in centred else 0.5))


def text_inputs(vocab_size: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Two rows, one right-padded, longer than every sliding window of the tiny configs."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, vocab_size, (ROWS, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 23:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def capture(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Logits, and the first output of every block and of the modules directly inside one, by module path."""
    found: dict[str, np.ndarray] = {}

    def hook(name):
        def save(_module, _inputs, output):
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor):
                found.setdefault(name, first.detach().float().numpy())

        return save

    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if re.search(SUBMODULES, n)]
    with torch.no_grad():
        logits = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return {"logits": logits.float().numpy(), **{f"module:{name}": value for name, value in found.items()}}


def main(config_path: str, folder: str) -> None:
    raw = json.loads(pathlib.Path(config_path).read_text())
    config = transformers.AutoConfig.for_model(**raw)
    config._attn_implementation = "eager"
    cls = getattr(transformers, raw["architectures"][0])
    model = cls(config).float().eval()
    redraw(model)
    model.save_pretrained(folder)
    (pathlib.Path(folder) / "config.json").write_text(json.dumps(raw, indent=2))
    inputs = text_inputs(config.vocab_size)
    expected = capture(model, inputs)
    with torch.no_grad():
        low = model.bfloat16()(**inputs).logits.float().numpy()
    arrays = {**{k: v.numpy() for k, v in inputs.items()}, **expected, "logits_bf16": low}
    np.savez_compressed(pathlib.Path(folder) / "expected.npz", **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
