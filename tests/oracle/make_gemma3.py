"""Writes a tiny random Gemma 3 with its tower and what transformers computes with it. Run by the oracle's Python.

    python make_gemma3.py CONFIG.json FOLDER

FOLDER gets the config as given and as transformers writes it (config_v5.json), model.safetensors under the hub's names, and expected.npz:
inputs, fp32 logits, the outputs of every layer of both towers and of the projector, and the rms error of transformers' bf16 logits.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from make_reference import redraw
from safetensors.torch import load_file, save_file


def make_inputs(config, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Two images in the first row, none in the second, two images without a token between them in the third; right-padded."""
    image, begin, end = config.image_token_id, config.boi_token_id, config.eoi_token_id

    def words(n):
        return torch.randint(10, 320, (n,), generator=generator)

    soft = torch.full((config.mm_tokens_per_image,), image)
    picture = torch.cat([torch.tensor([begin]), soft, torch.tensor([end])])
    rows = [
        torch.cat([words(3), picture, words(4), picture, words(5)]),
        words(17),
        torch.cat([words(1), soft, soft, words(9)]),
    ]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    size = config.vision_config.image_size
    pixels = torch.randn((4, config.vision_config.num_channels, size, size), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "token_type_ids": (ids == image).long(),
        "pixel_values": pixels.bfloat16().float(),
    }


def compute(model, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Logits, and the outputs of layers, attentions, tower and projector by module path; 0 at padding."""
    found, watched = {}, {"model.vision_tower.embeddings", "model.multi_modal_projector", "model.language_model.norm"}
    for tower in ("model.vision_tower.encoder", "model.language_model"):
        depth = len(model.get_submodule(f"{tower}.layers"))
        watched |= {f"{tower}.layers.{i}{part}" for i in range(depth) for part in ("", ".self_attn", ".mlp")}
    watched |= {"model.vision_tower.post_layernorm"}

    def save(name):
        # A hook's result would replace the output.
        return lambda _module, _inputs, out: found.update({name: out[0] if isinstance(out, tuple) else out})

    for name, module in model.named_modules():
        if name in watched:
            module.register_forward_hook(save(name))
    with torch.no_grad():
        logits = model(**inputs).logits
    assert set(found) == watched
    kept = inputs["attention_mask"][..., None]
    masked = {name: out * kept if "language_model" in name else out for name, out in found.items()}
    return {"logits": (logits * kept).numpy(), **{f"module:{name}": out.numpy() for name, out in masked.items()}}


def hub_name(name: str) -> str:
    """The hub's files have one level more in the tower than what transformers 5 writes of a new model."""
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def main(config_path: str, folder: pathlib.Path) -> None:
    raw = json.loads(pathlib.Path(config_path).read_text())
    config = transformers.Gemma3Config(**raw)
    config._attn_implementation = "eager"
    model = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    redraw(model)
    for p in model.parameters():
        p.data.copy_(p.data.bfloat16().float())
    inputs = make_inputs(config, torch.Generator().manual_seed(0))
    expected = compute(model, inputs)
    model.bfloat16().save_pretrained(folder)
    # Loaded anew, since a cast model would compute its rotary angles in bf16, which transformers does not.
    load = transformers.Gemma3ForConditionalGeneration.from_pretrained
    with torch.no_grad():
        low = load(folder, dtype=torch.bfloat16, attn_implementation="eager")(**inputs).logits.float().numpy()
    (folder / "generation_config.json").unlink()
    (folder / "config.json").rename(folder / "config_v5.json")
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    tensors = load_file(folder / "model.safetensors")
    save_file({hub_name(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    with torch.no_grad():
        again = load(folder, dtype=torch.float32, attn_implementation="eager")(**inputs).logits * inputs["attention_mask"][..., None]
    assert np.array_equal(again.numpy(), expected["logits"]), "transformers reads the hub's names as its own"
    kept = inputs["attention_mask"].numpy().astype(bool)
    error = np.sqrt(np.mean((low - expected["logits"])[kept] ** 2))
    arrays = {n: v.numpy() for n, v in inputs.items()} | expected | {"bf16_error": error}
    np.savez_compressed(folder / "expected.npz", **arrays)


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
