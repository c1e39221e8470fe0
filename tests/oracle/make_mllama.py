"""Writes a tiny random Llama 3.2 Vision and what transformers computes with it. Run by the oracle's Python.

    python make_mllama.py CONFIG.json FOLDER

FOLDER gets the config as given and as transformers writes it (config_v5.json), model.safetensors under the hub's names, and expected.npz:
inputs, fp32 logits, the outputs of every layer of all three stacks and of the projector, the rms error of transformers' bf16 logits, and
``logits_reference``: the logits by the rules that the released weights were trained with.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from make_reference import redraw
from transformers.models.mllama.processing_mllama import convert_sparse_cross_attention_mask_to_dense, get_cross_attention_token_mask

# The aspect ratio's id of each image of each row: 4 is all four tiles side by side, 7 three above each other.
RATIOS = ([2, 4], [], [1, 7])


def make_inputs(config, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Two images of 2 and 4 tiles in the first row, none in the second, two side by side of 1 and 3 tiles in the third; right-padded."""
    image, vision = torch.tensor([config.image_token_index]), config.vision_config

    def words(n):
        return torch.randint(10, 320, (n,), generator=generator)

    rows = [
        torch.cat([words(3), image, words(4), image, words(9)]),
        words(17),
        torch.cat([words(2), image, image, words(10)]),
    ]
    counts = [[int(np.prod(vision.supported_aspect_ratios[ratio - 1])) for ratio in row] for row in RATIOS]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=config.text_config.pad_token_id)
    places, tiles, size = max(map(len, RATIOS)), vision.max_num_tiles, vision.image_size
    pixels = torch.zeros(len(rows), places, tiles, vision.num_channels, size, size)
    ratios = torch.zeros(len(rows), places, dtype=torch.int64)
    mask = torch.zeros(len(rows), places, tiles, dtype=torch.int64)
    mask[..., 0] = 1
    for b, row in enumerate(counts):
        ratios[b, : len(row)] = torch.tensor(RATIOS[b])
        for i, count in enumerate(row):
            pixels[b, i, :count] = torch.randn((count, *pixels.shape[3:]), generator=generator)
            mask[b, i, :count] = 1
    seen = [get_cross_attention_token_mask(row.tolist(), config.image_token_index) for row in rows]
    return {
        "input_ids": ids,
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "pixel_values": pixels.bfloat16().float(),
        "aspect_ratio_ids": ratios,
        "aspect_ratio_mask": mask,
        "cross_attention_mask": torch.tensor(convert_sparse_cross_attention_mask_to_dense(seen, counts, tiles, ids.shape[1])),
    }


def compute(model, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Logits, and the outputs of layers, attentions, MLPs, tower and projector by module path; 0 at padding of the text."""
    found, watched = {}, {"model.multi_modal_projector", "model.language_model.norm", "model.vision_model"}
    for part in ("model.vision_model.transformer", "model.vision_model.global_transformer", "model.language_model"):
        for i, layer in enumerate(model.get_submodule(f"{part}.layers")):
            inner = [name for name, _ in layer.named_children() if name in ("self_attn", "cross_attn", "mlp") and "language" in part]
            watched |= {f"{part}.layers.{i}", *(f"{part}.layers.{i}.{name}" for name in inner)}

    def save(name):
        def hook(_module, _inputs, out):
            found[name] = out[0] if isinstance(out, tuple) else out.last_hidden_state if hasattr(out, "last_hidden_state") else out

        return hook

    handles = [module.register_forward_hook(save(name)) for name, module in model.named_modules() if name in watched]
    with torch.no_grad():
        logits = model(**inputs).logits
    for handle in handles:
        handle.remove()
    assert set(found) == watched
    kept = inputs["attention_mask"][..., None]
    masked = {name: out * kept if "language_model" in name else out for name, out in found.items()}
    return {"logits": (logits * kept).numpy(), **{f"module:{name}": out.numpy() for name, out in masked.items()}}


def reference_logits(model, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """Logits by the rules of training: intermediate states are those that enter a layer, and a token without an image attends to none."""
    tower = model.model.vision_model
    tower.intermediate_layers_indices = [i - 1 for i in tower.intermediate_layers_indices]
    sees = (inputs["cross_attention_mask"].flatten(2).sum(-1, keepdim=True) > 0).float()
    crossing = [module for module in model.modules() if type(module).__name__ == "MllamaTextCrossAttention"]
    handles = [module.register_forward_hook(lambda _module, _inputs, out: (out[0] * sees, *out[1:])) for module in crossing]
    with torch.no_grad():
        logits = model(**inputs).logits * inputs["attention_mask"][..., None]
    for handle in handles:
        handle.remove()
    tower.intermediate_layers_indices = [i + 1 for i in tower.intermediate_layers_indices]
    return logits.numpy()


def main(config_path: str, folder: pathlib.Path) -> None:
    raw = json.loads(pathlib.Path(config_path).read_text())
    config = transformers.MllamaConfig(**raw)
    config._attn_implementation = "eager"
    model = transformers.MllamaForConditionalGeneration(config).float().eval()
    redraw(model)
    for p in model.parameters():
        p.data.copy_(p.data.bfloat16().float())
    inputs = make_inputs(config, torch.Generator().manual_seed(0))
    expected = compute(model, inputs)
    expected["logits_reference"] = reference_logits(model, inputs)
    model.bfloat16().save_pretrained(folder)
    # Loaded anew, since a cast model would compute its rotary angles in bf16, which transformers does not.
    load = transformers.MllamaForConditionalGeneration.from_pretrained
    with torch.no_grad():
        low = load(folder, dtype=torch.bfloat16, attn_implementation="eager")(**inputs).logits.float().numpy()
    (folder / "generation_config.json").unlink()
    (folder / "config.json").rename(folder / "config_v5.json")
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)
    kept = inputs["attention_mask"].numpy().astype(bool)
    error = np.sqrt(np.mean((low - expected["logits"])[kept] ** 2))
    arrays = {n: v.numpy() for n, v in inputs.items()} | expected | {"bf16_error": error}
    np.savez_compressed(folder / "expected.npz", **arrays)


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
